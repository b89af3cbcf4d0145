"""Every kind of task, for text, video and audio, and a small model of these streams."""

from __future__ import annotations

import torch
from torch import Tensor

from kinodit.data.synthetic import SyntheticStream
from kinodit.data.tasks import StreamTask, TaskConfig
from kinodit.models.config import ConditionConfig, MMDiTConfig, StreamConfig
from kinodit.models.mmdit import MMDiT
from kinodit.models.tokens import Role, TokenBatch

ABSENT, CLEAN, NOISE = (StreamTask(use=u) for u in ("absent", "clean", "noise"))


def video(**settings: object) -> TaskConfig:
    """A task in which part of the video is given and there is no sound."""
    streams = {"video": StreamTask(**settings), "audio": ABSENT}  # type: ignore[arg-type]
    return TaskConfig(streams=streams)


TASKS: dict[str, TaskConfig] = {
    "text to video": TaskConfig(streams={"audio": ABSENT}),
    "text to audio": TaskConfig(streams={"video": ABSENT}),
    "text to both": TaskConfig(),
    "unconditional": TaskConfig(streams={"text": ABSENT}),
    "image to video": video(given="prefix"),
    "last frame": video(given="suffix"),
    "first and last": video(given="ends"),
    "any frames": video(given="random", frames=(1, 3)),
    "named frames": video(given="at", at=(0, -1)),
    "prediction": video(given="prefix", frames=(1, 2)),
    "interpolation": video(given="every", frames=(2, 2)),
    "inpainting": video(given="outside"),
    "outpainting": video(given="inside"),
    "video to audio": TaskConfig(streams={"video": CLEAN}),
    "audio to video": TaskConfig(streams={"audio": CLEAN}),
    "joint": TaskConfig(levels="stream"),
    "marginal": TaskConfig(streams={"audio": NOISE}),
    "levels of frames": TaskConfig(levels="frame"),
    "conditions first": TaskConfig(streams={"video": StreamTask(given="prefix")}, one_way=True),
    "sound by itself": TaskConfig(hidden={"audio": ["text", "video"]}),
    "blocks": TaskConfig(block_s=0.25),
    "blocks of video": TaskConfig(streams={"audio": CLEAN}, block_s=0.5),
    "blocks, the last seen": TaskConfig(block_s=0.25, context=1),
    "blocks, levels of streams": TaskConfig(levels="stream", block_s=0.25),
    "blocks, sound by itself": TaskConfig(hidden={"audio": ["text", "video"]}, block_s=0.25),
}

STREAMS = {
    "text": SyntheticStream(5, False),
    "video": SyntheticStream(6, True),
    "audio": SyntheticStream(3, True),
}
CONDITIONS = {"text_pooled": 4}

MODEL = MMDiTConfig(
    streams={
        "text": StreamConfig(in_channels=5, output=False),
        "video": StreamConfig(in_channels=6),
        "audio": StreamConfig(in_channels=3),
    },
    conditions={"text_pooled": ConditionConfig(4)},
    width=32,
    num_heads=2,
    num_double_blocks=2,
    num_single_blocks=1,
)


def av_model(config: MMDiTConfig = MODEL) -> MMDiT:
    """A model in float64 whose every parameter is drawn, so that no gate is closed."""
    model = MMDiT(config).double()
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=source).double())
    return model


def may_see(task: TaskConfig, batch: TokenBatch) -> Tensor:
    """[J, J] bool: which keys (columns) a query may see, token by token from what each token is."""
    facts = []
    for name, tokens in batch.modalities.items():
        is_copied = name != "text" and task.stream(name, False).use == "target" and task.block_s
        for segment, role, second in zip(
            tokens.segment.tolist(),
            tokens.role.tolist(),
            tokens.position[:, 0].tolist(),
            strict=True,
        ):
            block = int(second / task.block_s + 1e-3) if is_copied else -1
            facts.append((name, segment, role == int(Role.NOISED), block))
    sees = torch.zeros(len(facts), len(facts), dtype=torch.bool)
    for i, (name, segment, noised, block) in enumerate(facts):
        for j, (other, other_segment, other_noised, other_block) in enumerate(facts):
            if segment != other_segment or other in task.hidden.get(name, []):
                continue
            if task.block_s and other_noised:
                sees[i, j] = noised and block == other_block
            elif task.block_s:
                is_near = other_block < 0 or other_block >= block - (task.context or 99)
                is_past = other_block < block or (other_block == block and not noised)
                sees[i, j] = is_near and is_past
            else:
                sees[i, j] = not task.one_way or noised or not other_noised
    return sees
