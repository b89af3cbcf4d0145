"""Pretrained feature extractors in local folders, for distances between sets of samples.

Pictures and clips by vision models of transformers (DINOv2, CLIP, VideoMAE, ...), sounds by its
audio models (CLAP, wav2vec 2.0, ...), agreement of pictures and captions by CLIP.

Shape legend: T frames, H rows, W columns; A channels, N samples; D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kinodit.models.encoders.autoencoder import Dtype, load_autoencoder
from kinodit.models.encoders.base import EncoderError
from kinodit.models.encoders.folder import fingerprint, read_json, weights_folder
from kinodit.models.errors import ConfigError
from kinodit.models.libraries import import_extra, without_warnings

Kind = Literal["picture", "video", "sound", "clip_score"]
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""Of pixels, where the folder does not say."""


@dataclass(frozen=True)
class ExtractorConfig:
    """A model whose features samples and data are compared by.

    kind:      "picture" (FID and KID), "video" (FVD), "sound" (FAD), or "clip_score": the cosine
               of CLIP's vectors of caption and middle frame
    path:      folder with config.json, *.safetensors and, for sounds, preprocessor_config.json;
               for clip_score the tokenizer too
    dtype:     of the weights
    """

    kind: Kind = "picture"
    path: str = ""
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("an extractor has no path: give the folder of its weights")

    def build(self, device: torch.device) -> Extractor:
        """The extractor on `device`. Raises EncoderError or MissingExtraError."""
        return Extractor(self, device)


class Extractor:
    """A frozen model; each sample is taken alone."""

    def __init__(self, config: ExtractorConfig, device: torch.device) -> None:
        self.config = config
        self._device = device
        self._folder = weights_folder(config.path, None, f"extractor of kind {config.kind!r}")
        names = read_json(self._folder / "config.json").get("architectures") or []
        if len(names) != 1 or not str(names[0]).endswith(("Model", "ModelWithProjection")):
            raise EncoderError(
                f"{self._folder} holds {names}; an extractor is one model of transformers without "
                "a head, such as CLIPModel, Dinov2Model, VideoMAEModel, ClapModel"
            )
        if config.kind == "clip_score" and names[0] != "CLIPModel":
            raise EncoderError(f"{self._folder} holds a {names[0]}; clip_score needs a CLIPModel")
        model = load_autoencoder(self._folder, str(names[0]), config.dtype, "transformers")
        self._model = model.to(device)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of kind, format and files of weights."""
        return fingerprint([self._folder], (self.config.kind, self.config.dtype))

    @torch.no_grad()
    def of_video(self, video: Tensor) -> Tensor:
        """[D] float64 on the host, of uint8 [T, H, W, 3]; of its middle frame unless kind=video."""
        if self.config.kind != "video":
            return self._vector(pixel_values=self._pixels(video[len(video) // 2][None]))
        wanted = getattr(self._model.config, "num_frames", len(video))
        chosen = torch.linspace(0, len(video) - 1, wanted).round().long()
        return self._vector(pixel_values=self._pixels(video[chosen])[None])

    @torch.no_grad()
    def of_sound(self, sound: Tensor, rate_hz: int) -> Tensor:
        """[D] float64 on the host, of float32 [A, N]: resampled to what the model hears."""
        wanted = int(getattr(self._preprocessor, "sampling_rate", rate_hz))
        mono = sound.mean(0)
        size = max(1, round(mono.shape[0] * wanted / rate_hz))
        heard = torch.nn.functional.interpolate(mono[None, None], size=size, mode="linear")[0, 0]
        inputs = self._preprocessor(heard.numpy(), sampling_rate=wanted, return_tensors="pt")
        return self._vector(**inputs)

    @torch.no_grad()
    def agreement(self, video: Tensor, caption: str) -> float:
        """Cosine of CLIP's vectors of the middle frame of uint8 [T, H, W, 3] and the caption."""
        limit = self._model.config.text_config.max_position_embeddings
        ids = self._tokenizer(caption, truncation=True, max_length=limit, return_tensors="pt")
        picture = self._pixels(video[len(video) // 2][None])
        output = self._model(
            input_ids=ids["input_ids"].to(self._device),
            attention_mask=ids["attention_mask"].to(self._device),
            pixel_values=picture,
        )
        shown, said = output.image_embeds[0].double(), output.text_embeds[0].double()
        return float(torch.nn.functional.cosine_similarity(shown, said, dim=0))

    def _pixels(self, frames: Tensor) -> Tensor:
        """uint8 [T, H, W, 3] to the model's size and scale, [T, 3, S, S]."""
        vision = getattr(self._model.config, "vision_config", self._model.config)
        side = int(vision.image_size)
        pixels = frames.permute(0, 3, 1, 2).to(self._device, torch.float32) / 255
        pixels = torch.nn.functional.interpolate(
            pixels, size=(side, side), mode="bicubic", antialias=True
        ).clamp(0, 1)
        facts = self._folder / "preprocessor_config.json"
        document = read_json(facts) if facts.is_file() else {}
        mean, std = (
            torch.tensor(document.get(key) or default, device=self._device).reshape(1, 3, 1, 1)
            for key, default in (("image_mean", MEAN), ("image_std", STD))
        )
        return ((pixels - mean) / std).to(self._model.dtype)

    def _vector(self, **inputs: Tensor) -> Tensor:
        """[D]: the model's own vector, or the mean over its tokens."""
        moved = {
            name: value.to(self._device, self._model.dtype)
            if value.is_floating_point()
            else value.to(self._device)
            for name, value in inputs.items()
        }
        for method in ("get_image_features", "get_audio_features"):
            if hasattr(self._model, method):
                found: Any = getattr(self._model, method)(**moved)
                found = getattr(found, "pooler_output", found)
                return torch.as_tensor(found)[0].double().cpu()
        output = self._model(**moved)
        return torch.as_tensor(output.last_hidden_state)[0].double().mean(0).cpu()

    @cached_property
    def _preprocessor(self) -> Any:
        return self._from_folder("AutoFeatureExtractor", "preprocessor_config.json")

    @cached_property
    def _tokenizer(self) -> Any:
        return self._from_folder("AutoTokenizer", "tokenizer_config.json")

    def _from_folder(self, loader: str, file: str) -> Any:
        transformers = import_extra("transformers", "encoders", "a feature extractor")
        if not Path(self._folder / file).is_file():
            raise EncoderError(f"there is no {file} in {self._folder}, which its kind needs")
        with without_warnings():
            return getattr(transformers, loader).from_pretrained(
                self._folder, local_files_only=True, trust_remote_code=False
            )
