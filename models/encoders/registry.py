"""The encoders that a recipe can name."""

from __future__ import annotations

from kinodit.models.encoders.base import TextEncoderConfig, VideoCodecConfig
from kinodit.models.encoders.byte_text import ByteTextConfig
from kinodit.models.encoders.text import TransformersTextConfig
from kinodit.models.encoders.video_vae import DiffusersVaeConfig
from kinodit.models.encoders.wavelet import WaveletConfig

TEXT_ENCODERS: dict[str, type[TextEncoderConfig]] = {
    "bytes": ByteTextConfig,
    "transformers": TransformersTextConfig,
}

VIDEO_CODECS: dict[str, type[VideoCodecConfig]] = {
    "diffusers_vae": DiffusersVaeConfig,
    "wavelet": WaveletConfig,
}
