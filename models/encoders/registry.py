"""The encoders that a recipe can name."""

from __future__ import annotations

from kinodit.models.encoders.audio_vae import AudioVaeConfig
from kinodit.models.encoders.base import (
    AudioCodecConfig,
    TextEncoderConfig,
    VideoCodecConfig,
)
from kinodit.models.encoders.byte_text import ByteTextConfig
from kinodit.models.encoders.mdct import MdctConfig
from kinodit.models.encoders.mel import MelConfig
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

AUDIO_CODECS: dict[str, type[AudioCodecConfig]] = {
    "audio_vae": AudioVaeConfig,
    "mdct": MdctConfig,
    "mel": MelConfig,
}
