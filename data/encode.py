"""Decoded samples -> latents and text features, in the training process and on its device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kinodit.data.cache import BoundedCache
from kinodit.data.decode import DecodedSample, View
from kinodit.data.packing import EncodedSample
from kinodit.models.encoders.base import TextEncoder, TextFeatures, VideoCodec
from kinodit.models.errors import ConfigError
from kinodit.models.random import sample_generator, uniform

__all__ = ["EncodedSample", "SampleEncoder"]

TEXT, VIDEO, POOLED = "text", "video", "text_pooled"
MIB = 1 << 20


class SampleEncoder:
    """Encodes samples with frozen encoders.

    Each caption and each clip is encoded alone: in a batch of several, an encoder's last bits
    depend on the others, and so on what was cached before; a resumed run would differ.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        video_codec: VideoCodec,
        seed: int,
        condition_dropout: float,
        caption_cache_mib: int = 256,
        latent_cache_mib: int = 0,
    ) -> None:
        """An encoder of samples.

        Args:
            text_encoder: captions to features.
            video_codec: pixels to latents.
            seed: of the run.
            condition_dropout: share of samples that are given the empty caption instead of their
                own, so that the model learns the unconditional velocity that guidance needs.
            caption_cache_mib: memory for features of captions, on the encoder's device, MiB.
            latent_cache_mib: memory for latents of clips that are seen again in the same window
                and crop, on the codec's device, MiB; 0 is none.
        """
        if not 0 <= condition_dropout <= 1:
            raise ConfigError(f"condition_dropout is {condition_dropout}; it must be 0 to 1")
        self.text_encoder = text_encoder
        self.video_codec = video_codec
        self._seed = seed
        self._condition_dropout = condition_dropout
        self._captions = BoundedCache[str, TextFeatures](
            caption_cache_mib * MIB, lambda f: _num_bytes(f.tokens) + _num_bytes(f.pooled)
        )
        self._latents = BoundedCache[tuple[str, View], Tensor](latent_cache_mib * MIB, _num_bytes)

    def encode(self, pack: Sequence[DecodedSample]) -> list[EncodedSample]:
        """The samples of one pack as the model's inputs.

        Raises:
            ConfigError: a sample's sound was decoded, which no encoder here takes.
            EncoderError: the codec does not take clips of this size.
        """
        return [self._encode(sample) for sample in pack]

    def text(self, caption: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Token features {"text": [L, D]} and conditions {"text_pooled": [D]} of a caption."""
        features = self._captions.get(caption)
        if features is None:
            (features,) = self.text_encoder.encode([caption])
            self._captions.put(caption, features)
        return {TEXT: features.tokens}, {POOLED: features.pooled}

    def _encode(self, sample: DecodedSample) -> EncodedSample:
        if sample.audio is not None:
            raise ConfigError(
                f"the sound of sample {sample.ref.sample_id} was decoded, but no encoder takes it: "
                "set data.use_audio=false"
            )
        draw = uniform(sample_generator(self._seed, sample.key, "condition_dropout"))
        text, conditions = self.text("" if draw < self._condition_dropout else sample.caption)
        latents: dict[str, Tensor] = {}
        seconds: dict[str, float] = {}
        if sample.video is not None:
            latents[VIDEO] = self._clip(sample, sample.video)
            seconds[VIDEO] = self.video_codec.stride[0] / sample.fps
        return EncodedSample(
            key=sample.key, latents=latents, seconds=seconds, text=text, conditions=conditions
        )

    def _clip(self, sample: DecodedSample, video: Tensor) -> Tensor:
        name = sample.ref.sample_id, sample.view
        latents = self._latents.get(name)
        if latents is None:
            latents = self.video_codec.encode(video)
            self._latents.put(name, latents)
        return latents


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
