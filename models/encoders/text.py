"""Text encoders of `transformers` from a local folder: BERT, T5, UMT5, CLIP, decoder-only LLMs.

The only importer of transformers. Weights are safetensors, code is the library's own: what a
folder brings along is never run. Shape legend: P captions, L tokens (padded in a call, real ones
alone in what is returned), D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kinodit.models.encoders.base import EncoderError, TextEncoderConfig, TextFeatures
from kinodit.models.encoders.folder import fingerprint, read_json, weights_folder
from kinodit.models.encoders.offload import Resident
from kinodit.models.errors import ConfigError
from kinodit.models.libraries import import_extra, without_warnings

CAPTION = "{caption}"


@dataclass(frozen=True, kw_only=True)
class TransformersTextConfig(TextEncoderConfig):
    """A text encoder in a local folder.

    path:           folder with config.json, *.safetensors and, unless `tokenizer_path` is given,
                    the tokenizer
    package:        instead of `path`: an installed Python package that carries such a folder
    tokenizer_path: folder of the tokenizer, where it is not beside the weights
    max_tokens:     longer captions are cut; also those with more tokens than the model has places
                    for (77 of CLIP)
    layer:          whose output the features are: -1 the last one's after the final norm, -2 the
                    one before it, ... as the model's `hidden_states` count
    layers:         instead of `layer`: several, whose outputs are one token's features side by side
    pooled:         "mean" or "last" of the real tokens' features, or the "model"'s own vector
                    (CLIP: the end token, projected where the model has a projection; BERT: its
                    pooler)
    template:       what the encoder reads; {caption} stands for the caption
    skip_tokens:    leading tokens (of the template) that are encoded and left out
    dtype:          of the weights; features are float32
    batch_size:     captions encoded at once
    offload:        weights are in the host's memory while no caption is encoded
    shard:          weights are split over the ranks of a run that has several
    """

    name: Literal["transformers"] = "transformers"
    path: str | None = None
    package: str | None = None
    tokenizer_path: str | None = None
    max_tokens: int = 128
    layer: int = -1
    layers: tuple[int, ...] = ()
    pooled: Literal["mean", "last", "model"] = "mean"
    template: str = CAPTION
    skip_tokens: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch_size: int = 32
    offload: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        if self.offload and self.shard:
            raise ConfigError(
                "a text encoder has offload=true, which copies all of its weights to the device, "
                "and shard=true, which gathers them block by block: set one of them to false"
            )
        if max(self.chosen) >= 0:
            raise ConfigError(
                f"a text encoder's layer counts from the end: -1, -2, got {max(self.chosen)}"
            )
        if self.layers and self.layer != -1:
            raise ConfigError(
                f"a text encoder has layer {self.layer} and layers {list(self.layers)}: leave one "
                "of them out"
            )
        if CAPTION not in self.template:
            raise ConfigError(
                f"a text encoder's template contains {CAPTION}, got {self.template!r}"
            )
        if not 0 <= self.skip_tokens < self.max_tokens or self.batch_size < 1:
            raise ConfigError(
                f"a text encoder needs 0 <= skip_tokens < max_tokens and batch_size >= 1, got "
                f"skip_tokens={self.skip_tokens}, max_tokens={self.max_tokens}, "
                f"batch_size={self.batch_size}"
            )

    @property
    def chosen(self) -> tuple[int, ...]:
        """The layers whose outputs the features are."""
        return self.layers or (self.layer,)

    def build(self, device: torch.device) -> TransformersTextEncoder:
        """The encoder on `device`. Raises EncoderError or MissingExtraError."""
        return TransformersTextEncoder(self, device)


class TransformersTextEncoder:
    """A frozen text encoder."""

    def __init__(self, config: TransformersTextConfig, device: torch.device) -> None:
        what = "text encoder 'transformers'"
        self._config = config
        self._device = device
        self.max_tokens = config.max_tokens - config.skip_tokens
        self._folder = weights_folder(config.path, config.package, what)
        self._tokenizer_folder = (
            self._folder if config.tokenizer_path is None else Path(config.tokenizer_path)
        )
        if not self._tokenizer_folder.is_dir():
            raise EncoderError(f"{what}: there is no tokenizer folder {self._tokenizer_folder}")
        self._tokenizer, self._model = _load(self._folder, self._tokenizer_folder, config)
        self._model.eval().requires_grad_(False)
        self._entry: nn.Module = self._model
        self._resident: Resident | None = None
        self._most_ids = min([config.max_tokens, *_num_places(self._model)])
        if not config.shard:
            self._place()
        text_config = self._model.config.get_text_config()
        self.token_dim: int = text_config.hidden_size * len(config.chosen)
        self.pooled_dim: int = self.token_dim
        if config.pooled == "model":
            projected = hasattr(self._model, "text_projection")
            own = text_config.projection_dim if projected else text_config.hidden_size
            self.pooled_dim = own
        num_layers: int = text_config.num_hidden_layers
        if -min(config.chosen) > num_layers + 1:
            raise EncoderError(
                f"{what}: layer {min(config.chosen)} of a model of {num_layers} layers; "
                f"the lowest is {-num_layers - 1}"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the settings that matter and of the files of weights and tokenizer."""
        settings = asdict(self._config)
        for place in ("path", "package", "tokenizer_path", "batch_size", "offload", "shard"):
            del settings[place]
        if not self._config.layers:
            # Encoders of one layer keep the fingerprints that they had.
            del settings["layers"]
        return fingerprint([self._folder, self._tokenizer_folder], sorted(settings.items()))

    def encode(self, captions: Sequence[str]) -> list[TextFeatures]:
        """Features of each caption: tokens [L, D] (real ones only), pooled; float32."""
        rows = [self._token_ids(caption) for caption in captions]
        features: list[TextFeatures] = []
        with self._place().use():
            for start in range(0, len(rows), self._config.batch_size):
                features += self._encode_rows(rows[start : start + self._config.batch_size])
        return features

    @property
    def splits(self) -> bool:
        """Whether the weights are to be split over ranks, if there are several."""
        return self._config.shard

    def split(self, apply: Callable[[nn.Module, Sequence[nn.Module]], None]) -> None:
        """Let `apply` split the weights, which are on the host: once, before anything is encoded.

        It is given the model, and those of its modules whose weights are used one after the other:
        the blocks, and the table of tokens. From then on `encode` is for all ranks at once.

        Raises:
            EncoderError: the model has no blocks.
        """
        assert self._resident is None, "the weights have their place already"
        blocks = _blocks(self._model)
        if not blocks:
            raise EncoderError(
                f"the text encoder in {self._folder} has no list of blocks to split: set "
                "shard=false, or offload=true instead"
            )
        # FSDP2 gives a module that it wraps another class, by whose name the library knows models.
        self._entry = _Entry(self._model)
        apply(self._entry, blocks)
        self._place()

    def _place(self) -> Resident:
        """The weights where they are used from; at first use those that nobody has split."""
        if self._resident is None:
            self._resident = Resident(self._model, self._device, offload=self._config.offload)
        return self._resident

    def _token_ids(self, caption: str) -> list[int]:
        text = self._config.template.replace(CAPTION, caption)
        limit = self._most_ids
        ids: list[int] = self._tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        if len(ids) > self._config.skip_tokens:
            return ids
        # Some tokenizers make nothing of an empty caption; attention needs a token.
        special = (self._tokenizer.eos_token_id, self._tokenizer.pad_token_id, 0)
        return [*ids, next(token for token in special if token is not None)]

    @torch.no_grad()
    def _encode_rows(self, rows: list[list[int]]) -> list[TextFeatures]:
        config = self._config
        longest = max(len(row) for row in rows)
        pad = self._tokenizer.pad_token_id or 0
        ids_PL = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        real_PL = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        output = self._entry(
            input_ids=ids_PL.to(self._device),
            attention_mask=real_PL.to(self._device),
            output_hidden_states=config.chosen != (-1,),
        )
        hidden_PLD: Tensor = torch.cat(
            [
                output.last_hidden_state if layer == -1 else output.hidden_states[layer]
                for layer in config.chosen
            ],
            dim=-1,
        )
        pooled: Tensor | None = None
        if config.pooled == "model":
            pooled = output.get("text_embeds", output.get("pooler_output"))
            if pooled is None:
                raise EncoderError(
                    f"the text encoder in {self._folder} has no pooled vector of its own: "
                    f"set pooled to 'mean' or 'last'"
                )
        features = []
        for index, row in enumerate(rows):
            tokens = hidden_PLD[index, config.skip_tokens : len(row)].to(torch.float32)
            if pooled is not None:
                vector = pooled[index].to(torch.float32)
            else:
                vector = tokens.mean(0) if config.pooled == "mean" else tokens[-1]
            features.append(TextFeatures(tokens=tokens, pooled=vector))
        return features


def _load(folder: Path, tokenizer_folder: Path, config: TransformersTextConfig) -> tuple[Any, Any]:
    """Tokenizer and model; whatever the library dislikes about the folder is an EncoderError."""
    transformers = import_extra("transformers", "encoders", "a text encoder from a folder")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet(transformers), without_warnings():
            tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, **local)
            model, info = _model_class(transformers, folder).from_pretrained(
                folder,
                **local,
                use_safetensors=True,
                dtype=getattr(torch, config.dtype),
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise EncoderError(
            f"cannot load the text encoder in {folder}: {' '.join(str(error).split())}"
        ) from error
    # A folder of another head (masked language model, ...) may lack the pooler, and nothing else.
    missing = [
        key
        for key in info["missing_keys"]
        if config.pooled == "model" or not key.startswith("pooler.")
    ]
    if missing:
        raise EncoderError(
            f"the weights in {folder} lack {len(missing)} tensors of the model, "
            f"for instance {sorted(missing)[0]!r}: they are those of another model"
        )
    return tokenizer, model


class _Entry(nn.Module):
    """A module around a model, which can be wrapped in its place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def _num_places(model: Any) -> list[int]:
    """How many tokens a model with a table of places takes; none of one that has no table."""
    tables = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ("position_embedding", "position_embeddings")
        and isinstance(module, nn.Embedding)
    ]
    # A table with a row for padding begins after it, as that of RoBERTa.
    return [t.num_embeddings - (0 if t.padding_idx is None else t.padding_idx + 1) for t in tables]


def _blocks(model: Any) -> list[nn.Module]:
    """The members of the outermost lists of modules, and the table of tokens if it has its own."""
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            blocks += list(module)
            inside.update(part for block in module for part in block.modules())
    if not blocks:
        return []
    # T5 has two tables of the same weights: as one module they have one owner.
    model.set_input_embeddings(model.get_input_embeddings())
    table = model.get_input_embeddings()
    users = {m for m in model.modules() for p in m.parameters(recurse=False) if p is table.weight}
    return [*blocks, table] if users == {table} else blocks


def _model_class(transformers: Any, folder: Path) -> Any:
    """The class that turns text to features, given the folder's config.json."""
    document = read_json(folder / "config.json")
    kind = str(document.get("model_type"))
    architectures = document.get("architectures") or []
    if kind in ("clip", "clip_text_model"):
        if "CLIPTextModelWithProjection" in architectures:
            return transformers.CLIPTextModelWithProjection
        return transformers.CLIPTextModel
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES
    if kind in mapping:
        return transformers.AutoModelForTextEncoding
    if document.get("is_encoder_decoder"):
        raise EncoderError(
            f"{folder} holds an encoder-decoder of type {kind!r}, whose encoder alone is not known"
        )
    return transformers.AutoModel


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's reports on unused weights and its progress bars."""
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
