"""Named sizes of the model: a table.

The first rows are for runs of one's own; a run replaces the channels of their streams and
conditions by those of its encoders. The others have the shapes of released models, for
importing their weights and for estimates.
"""

from __future__ import annotations

from dataclasses import replace

from kinodit.models.config import ConditionConfig, MMDiTConfig, StreamConfig
from kinodit.models.rope import RopeConfig


def _text_to_video(width: int, head_dim: int, double: int, single: int) -> MMDiTConfig:
    """Features of a T5-sized text encoder, 16-channel latents in patches of 1 x 2 x 2."""
    return MMDiTConfig(
        streams={
            "text": StreamConfig(in_channels=4096, output=False, position="none"),
            "video": StreamConfig(in_channels=64),
        },
        conditions={"text_pooled": ConditionConfig(dim=4096)},
        width=width,
        num_heads=width // head_dim,
        num_double_blocks=double,
        num_single_blocks=single,
    )


def _audio_video(width: int, audio_width: int, head_dim: int, double: int) -> MMDiTConfig:
    """The same with a stream of sound: 64-channel latents, one a token, in joint blocks only.

    The stream of sound is narrower: it has a tenth of the tokens, and less to say in each.
    """
    plain = _text_to_video(width, head_dim, double, single=0)
    sound = StreamConfig(in_channels=64, width=audio_width)
    return replace(plain, streams={**plain.streams, "audio": sound})


def _tiny(**channels: int) -> MMDiTConfig:
    """A model for a CPU: text, and streams that are generated, with so many channels each."""
    return MMDiTConfig(
        streams={
            "text": StreamConfig(in_channels=384, output=False, position="none"),
            **{name: StreamConfig(in_channels=count) for name, count in channels.items()},
        },
        conditions={"text_pooled": ConditionConfig(dim=384)},
        width=192,
        num_heads=3,
        num_double_blocks=4,
    )


PRESETS: dict[str, MMDiTConfig] = {
    "tiny": _tiny(video=384),
    "tiny_av": _tiny(video=384, audio=64),
    "tiny_audio": _tiny(audio=64),
    "300m": _text_to_video(width=768, head_dim=64, double=14, single=0),
    "2b": _text_to_video(width=1536, head_dim=64, double=24, single=0),
    # Widths are multiples of 1024, so that heads and channels divide over 8 tensor-parallel ranks.
    "8b": _text_to_video(width=3072, head_dim=128, double=12, single=28),
    "14b_av": _audio_video(width=4096, audio_width=2048, head_dim=128, double=20),
    "14b": _text_to_video(width=4096, head_dim=128, double=10, single=32),
    "30b": _text_to_video(width=5120, head_dim=128, double=12, single=48),
    # Stable Diffusion 3 medium (Esser et al., arXiv 2403.03206): 64-pixel base grid of latents,
    # table of 192 x 192 patches.
    "sd3_medium": MMDiTConfig(
        streams={
            "image": StreamConfig(in_channels=64, position="sincos_2d", position_scale=64 / 192),
            "text": StreamConfig(in_channels=4096, output=False, position="none"),
        },
        conditions={"pooled": ConditionConfig(dim=2048)},
        width=1536,
        num_heads=24,
        num_double_blocks=24,
        qk_norm="none",
    ),
    # FLUX.1 [dev] (Black Forest Labs, 2024). Its first axis is always 0; row and column count.
    "flux_dev": MMDiTConfig(
        streams={
            "text": StreamConfig(in_channels=4096, output=False, position="none"),
            "image": StreamConfig(in_channels=64),
        },
        conditions={"pooled": ConditionConfig(dim=768), "guidance": ConditionConfig(1, "scalar")},
        width=3072,
        num_heads=24,
        num_double_blocks=19,
        num_single_blocks=38,
        rope=RopeConfig(axes=(16, 56, 56)),
    ),
    # HunyuanVideo (arXiv 2412.03603): its time axis counts latent frames, 4 of 24 fps each.
    "hunyuan_video": MMDiTConfig(
        streams={
            "video": StreamConfig(in_channels=64),
            "text": StreamConfig(in_channels=4096, output=False, position="none", refiner_blocks=2),
        },
        conditions={"pooled": ConditionConfig(dim=768), "guidance": ConditionConfig(1, "scalar")},
        width=3072,
        num_heads=24,
        num_double_blocks=20,
        num_single_blocks=40,
        rope=RopeConfig(axes=(16, 56, 56), base=256.0, time_scale=6.0),
    ),
}
