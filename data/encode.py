"""Decoded samples -> latents and text features, in the training process and on its device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinodit.data.cache import BoundedCache
from kinodit.data.decode import DecodedSample, View
from kinodit.data.packing import EncodedSample
from kinodit.models.encoders.base import AudioCodec, TextEncoder, TextFeatures, VideoCodec
from kinodit.models.errors import ConfigError
from kinodit.models.random import sample_generator, uniform

__all__ = ["EncodedSample", "Encoders", "SampleEncoder"]

TEXT, VIDEO, AUDIO, POOLED = "text", "video", "audio", "text_pooled"
MIB = 1 << 20


@dataclass(frozen=True)
class Encoders:
    """The frozen encoders of a run.

    text:        captions to features
    video:       pixels to latents; None: pictures are not decoded
    audio:       sound to latents; None: sound is not decoded
    audio_patch: latent frames of a token: sound is padded with silence to whole tokens
    """

    text: TextEncoder
    video: VideoCodec | None = None
    audio: AudioCodec | None = None
    audio_patch: int = 1

    def seconds(self, fps: float) -> dict[str, float]:
        """Stream -> seconds from one latent frame to the next, of clips of `fps`."""
        seconds = {}
        if self.video is not None:
            seconds[VIDEO] = self.video.stride[0] / fps
        if self.audio is not None:
            seconds[AUDIO] = self.audio.hop / self.audio.format.rate_hz
        return seconds

    @property
    def all(self) -> tuple[TextEncoder | VideoCodec | AudioCodec, ...]:
        """Those that there are."""
        return tuple(e for e in (self.text, self.video, self.audio) if e is not None)

    def num_audio_frames(self, num_samples: int) -> int:
        """Latent frames, in whole tokens, of a sound of so many samples."""
        assert self.audio is not None
        return self.audio_patch * -(-num_samples // (self.audio.hop * self.audio_patch))


class SampleEncoder:
    """Encodes samples with frozen encoders.

    Each caption, clip and sound is encoded alone: in a batch of several, an encoder's last bits
    depend on the others, and so on what was cached before; a resumed run would differ.
    """

    def __init__(
        self,
        encoders: Encoders,
        seed: int,
        condition_dropout: float,
        caption_cache_mib: int = 256,
        latent_cache_mib: int = 0,
    ) -> None:
        """An encoder of samples.

        Args:
            encoders: of the run.
            seed: of the run.
            condition_dropout: share of samples that are given the empty caption instead of their
                own, so that the model learns the unconditional velocity that guidance needs.
            caption_cache_mib: memory for features of captions, on the encoder's device, MiB.
            latent_cache_mib: memory for latents of clips and sounds that are seen again in the same
                window and crop, on the codecs' device, MiB; 0 is none.
        """
        if not 0 <= condition_dropout <= 1:
            raise ConfigError(f"condition_dropout is {condition_dropout}; it must be 0 to 1")
        self.encoders = encoders
        self._seed = seed
        self._condition_dropout = condition_dropout
        self._captions = BoundedCache[str, TextFeatures](
            caption_cache_mib * MIB, lambda f: _num_bytes(f.tokens) + _num_bytes(f.pooled)
        )
        self._latents = BoundedCache[tuple[str, str, View], Tensor](
            latent_cache_mib * MIB, _num_bytes
        )

    def encode(self, pack: Sequence[DecodedSample]) -> list[EncodedSample]:
        """The samples of one pack as the model's inputs.

        Raises:
            ConfigError: a sample's pictures or sound were decoded, which no encoder here takes.
            EncoderError: a codec does not take clips of this size.
        """
        return [self._encode(sample) for sample in pack]

    def text(self, caption: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Token features {"text": [L, D]} and conditions {"text_pooled": [D]} of a caption."""
        features = self._captions.get(caption)
        if features is None:
            (features,) = self.encoders.text.encode([caption])
            self._captions.put(caption, features)
        return {TEXT: features.tokens}, {POOLED: features.pooled}

    def _encode(self, sample: DecodedSample) -> EncodedSample:
        draw = uniform(sample_generator(self._seed, sample.key, "condition_dropout"))
        text, conditions = self.text("" if draw < self._condition_dropout else sample.caption)
        latents: dict[str, Tensor] = {}
        if sample.video is not None:
            codec = self.encoders.video
            if codec is None:
                raise _unwanted(sample, "pictures", "data.use_video=false")
            latents[VIDEO] = self._cached(sample, VIDEO, sample.video, codec.encode)
        if sample.audio is not None:
            audio = self.encoders.audio
            if audio is None:
                raise _unwanted(sample, "sound", "data.use_audio=false")
            latents[AUDIO] = self._cached(sample, AUDIO, sample.audio, self._sound)
        seconds = self.encoders.seconds(sample.fps)
        return EncodedSample(
            key=sample.key,
            latents=latents,
            seconds={name: seconds[name] for name in latents},
            text=text,
            conditions=conditions,
        )

    def _sound(self, sound: Tensor) -> Tensor:
        audio = self.encoders.audio
        assert audio is not None
        num_samples = self.encoders.num_audio_frames(sound.shape[1]) * audio.hop
        return audio.encode(torch.nn.functional.pad(sound, (0, num_samples - sound.shape[1])))

    def _cached(
        self, sample: DecodedSample, stream: str, media: Tensor, encode: Callable[[Tensor], Tensor]
    ) -> Tensor:
        name = stream, sample.ref.sample_id, sample.view
        latents = self._latents.get(name)
        if latents is None:
            latents = encode(media)
            self._latents.put(name, latents)
        return latents


def _unwanted(sample: DecodedSample, what: str, setting: str) -> ConfigError:
    return ConfigError(
        f"the {what} of sample {sample.ref.sample_id} were decoded, but no encoder takes them: "
        f"set {setting}"
    )


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
