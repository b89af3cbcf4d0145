"""Decoded samples -> latents and text features, in the training process and on its device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kinodit.data.cache import BoundedCache
from kinodit.data.colour import Planes
from kinodit.data.decode import DecodedSample, View
from kinodit.data.latents import Encoded
from kinodit.data.packing import EncodedSample
from kinodit.models.encoders.base import (
    AudioCodec,
    Posterior,
    TextEncoder,
    TextFeatures,
    VideoCodec,
    posterior_of,
)
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

    @property
    def fingerprints(self) -> dict[str, str]:
        """Stream -> what names its encoder in a cache."""
        found = {TEXT: self.text.fingerprint}
        if self.video is not None:
            found[VIDEO] = self.video.fingerprint
        if self.audio is not None:
            found[AUDIO] = f"{self.audio.fingerprint} patch {self.audio_patch}"
        return found

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
        self._latents = BoundedCache[tuple[str, str, View], Posterior](
            latent_cache_mib * MIB,
            lambda p: _num_bytes(p.mean) + (0 if p.logvar is None else _num_bytes(p.logvar)),
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
        features = self._features(caption)
        return {TEXT: features.tokens}, {POOLED: features.pooled}

    def _features(self, caption: str) -> TextFeatures:
        features = self._captions.get(caption)
        if features is None:
            (features,) = self.encoders.text.encode([caption])
            self._captions.put(caption, features)
        return features

    def encode_whole(self, sample: DecodedSample) -> Encoded:
        """Everything that a sample's view and captions encode to: for caches on disk."""
        texts = {}
        for caption in sample.meta.captions:
            texts[caption.text] = self._features(caption.text)
        return Encoded(self._posteriors(sample), texts, sample.view, sample.fps, sample.start_s)

    @property
    def _device(self) -> torch.device:
        """That of the encoders."""
        return self._features("").tokens.device

    def _encode(self, sample: DecodedSample) -> EncodedSample:
        draw = uniform(sample_generator(self._seed, sample.key, "condition_dropout"))
        caption = "" if draw < self._condition_dropout else sample.caption
        kept = sample.encoded.texts.get(caption) if sample.encoded is not None else None
        if kept is None:
            text, conditions = self.text(caption)
        else:
            kept = kept.to(self._device)
            text, conditions = {TEXT: kept.tokens}, {POOLED: kept.pooled}
        latents = {
            stream: posterior.draw(sample_generator(self._seed, sample.key, f"posterior/{stream}"))
            for stream, posterior in self._posteriors(sample).items()
        }
        seconds = self.encoders.seconds(sample.fps)
        return EncodedSample(
            key=sample.key,
            latents=latents,
            seconds={name: seconds[name] for name in latents},
            text=text,
            conditions=conditions,
        )

    def _posteriors(self, sample: DecodedSample) -> dict[str, Posterior]:
        """Stream -> what is known of its latents."""
        if sample.encoded is not None:
            device = self._device
            return {name: kept.to(device) for name, kept in sample.encoded.latents.items()}
        found: dict[str, Posterior] = {}
        video: Tensor | Planes | None = sample.planes if sample.video is None else sample.video
        if video is not None:
            codec = self.encoders.video
            if codec is None:
                raise _unwanted(sample, "pictures", "data.use_video=false")
            found[VIDEO] = self._cached(sample, VIDEO, video, partial(posterior_of, codec))
        if sample.audio is not None:
            if self.encoders.audio is None:
                raise _unwanted(sample, "sound", "data.use_audio=false")
            found[AUDIO] = self._cached(sample, AUDIO, sample.audio, self._sound)
        return found

    def _sound(self, sound: Tensor) -> Posterior:
        audio = self.encoders.audio
        assert audio is not None
        num_samples = self.encoders.num_audio_frames(sound.shape[1]) * audio.hop
        padding = (0, num_samples - sound.shape[1])
        return posterior_of(audio, torch.nn.functional.pad(sound, padding))

    def _cached(
        self,
        sample: DecodedSample,
        stream: str,
        media: Tensor | Planes,
        encode: Callable[[Tensor], Posterior],
    ) -> Posterior:
        name = stream, sample.ref.sample_id, sample.view
        posterior = self._latents.get(name)
        if posterior is None:
            whole = media.to_rgb(self._device) if isinstance(media, Planes) else media
            posterior = encode(whole)
            self._latents.put(name, posterior)
        return posterior


def _unwanted(sample: DecodedSample, what: str, setting: str) -> ConfigError:
    return ConfigError(
        f"the {what} of sample {sample.ref.sample_id} were decoded, but no encoder takes them: "
        f"set {setting}"
    )


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
