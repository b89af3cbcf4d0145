"""Pretrained feature extractors in local folders, for distances between sets of samples.

Pictures and clips by vision models of transformers (DINOv2, CLIP, VideoMAE, ...), sounds by its
audio models (CLAP, wav2vec 2.0, ...), agreement of pictures and captions by CLIP, and of picture
and sound in time by one model of each.

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

Kind = Literal["picture", "video", "sound", "clip_score", "synchrony"]
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""Of pixels, where the folder does not say."""
LEAST_SOUND_S = 0.1
"""Of the sound around a frame: models of sounds take no less."""


@dataclass(frozen=True)
class ExtractorConfig:
    """A model whose features samples and data are compared by.

    kind:       "picture" (FID and KID), "video" (FVD), "sound" (FAD); "clip_score": the cosine of
                CLIP's vectors of caption and middle frame; "synchrony": whether features of frames
                and of the sound around them change at the same time
    path:       folder with config.json, *.safetensors and, for sounds, preprocessor_config.json;
                for clip_score the tokenizer too; of synchrony the model of pictures
    sound_path: of synchrony, the folder of the model of sounds
    dtype:      of the weights
    """

    kind: Kind = "picture"
    path: str = ""
    sound_path: str = ""
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("an extractor has no path: give the folder of its weights")
        if bool(self.sound_path) != (self.kind == "synchrony"):
            raise ConfigError(
                f"an extractor of kind {self.kind} with sound_path={self.sound_path!r}: synchrony "
                "needs a folder of a model of sounds there, and no other kind takes one"
            )

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
        self._hearing: Extractor | None = None
        if config.kind == "synchrony":
            self._hearing = Extractor(
                ExtractorConfig("sound", config.sound_path, dtype=config.dtype), device
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of kind, format and files of weights."""
        folders = [self._folder] if self._hearing is None else [self._folder, self._hearing._folder]
        return fingerprint(folders, (self.config.kind, self.config.dtype))

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

    def changes(
        self, video: Tensor, fps: float, sound: Tensor, rate_hz: int
    ) -> tuple[Tensor, Tensor]:
        """[T - 1] each, float64: how much a frame, and the sound around it, differ from the last.

        Of uint8 [T, H, W, 3] and float32 [A, N]; distances of features. A sound ends in silence.
        """
        assert self._hearing is not None
        seen = torch.stack([self.of_video(frame[None]) for frame in video])
        size = round(max(1 / fps, LEAST_SOUND_S) * rate_hz)
        needed = round((len(video) / fps) * rate_hz) + size
        around = torch.nn.functional.pad(sound, (size, max(0, needed - sound.shape[1])))
        heard = []
        for index in range(len(video)):
            first = size + round((index + 0.5) / fps * rate_hz) - size // 2
            heard.append(self._hearing.of_sound(around[:, first : first + size], rate_hz))
        return _steps(seen), _steps(torch.stack(heard))

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


def _steps(features: Tensor) -> Tensor:
    """[T - 1]: the distance from each row of [T, D] to the next."""
    return (features[1:] - features[:-1]).square().sum(dim=1).sqrt()
