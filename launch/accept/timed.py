"""Training steps of a preset, timed: `torchrun -m kinodit.launch.accept.timed SPEC.json OUT.json`.

What a run does is done, but for its data: noise is drawn on the host, packs are cut and sent, the
model goes forward and backward, gradients are summed and clipped, weights and their average are
updated.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kinodit.launch.topology import process_group, read_topology
from kinodit.models.config import MMDiTConfig
from kinodit.models.diffusion.objective import RectifiedFlowConfig, TokenShape, build_objective
from kinodit.models.mmdit import MMDiT
from kinodit.models.presets import PRESETS
from kinodit.models.tokens import ModalityTokens, Role, SampleKey, TokenBatch, build_layout
from kinodit.trainer.ema import Ema, EmaConfig
from kinodit.trainer.engine.native import NativeEngine
from kinodit.trainer.optim import OptimConfig, build_optimizer
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.parts import local_part
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.step import Step

NUM_WARM_STEPS = 2
SEED = 0


@dataclass(frozen=True)
class Spec:
    """What is timed.

    preset:    a key of PRESETS
    tokens:    stream -> tokens of one sample
    segments:  samples of a pack
    packs:     packs of a step, of all ranks together
    parallel:  the layout; its dp_shard is given
    num_steps: that are timed, after NUM_WARM_STEPS that are not
    """

    preset: str
    tokens: dict[str, int]
    segments: int
    packs: int
    parallel: ParallelConfig
    remat: RematConfig = field(default_factory=RematConfig)
    precision: PrecisionConfig = field(default_factory=lambda: PrecisionConfig(compute="bfloat16"))
    num_steps: int = 5

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def of_json(cls, document: dict[str, Any]) -> Spec:
        """What `to_json` gave."""
        parts = {"parallel": ParallelConfig, "remat": RematConfig, "precision": PrecisionConfig}
        return cls(**{k: parts[k](**v) if k in parts else v for k, v in document.items()})


@dataclass(frozen=True)
class Timing:
    """step_s: the median of steps_s, seconds; peak_bytes: of this rank's device, 0 on a CPU."""

    step_s: float
    steps_s: tuple[float, ...]
    peak_bytes: int


def pack_of(model: MMDiTConfig, spec: Spec, slots: range) -> TokenBatch:
    """A pack of the spec's sizes. Values decide no time; positions and channels are the model's."""
    modalities = {}
    for name, stream in model.streams.items():
        length = spec.tokens[name]
        segment = torch.arange(len(slots)).repeat_interleave(length)
        total = len(segment)
        modalities[name] = ModalityTokens(
            latents=torch.sin(torch.arange(total * stream.in_channels)).view(total, -1),
            segment=segment,
            group=torch.zeros(total, dtype=torch.int64),
            position=torch.arange(total).unsqueeze(1).expand(total, 3) % 60.0,
            role=torch.full(
                (total,), int(Role.NOISED if stream.output else Role.CLEAN), dtype=torch.int8
            ),
            level=segment.clone(),
            weight=torch.full((total,), float(stream.output)),
        )
    return TokenBatch(
        modalities=modalities,
        level_segment=torch.arange(len(slots)),
        level_t=torch.zeros(len(slots)),
        conditions={
            name: torch.ones(len(slots), one.dim) for name, one in model.conditions.items()
        },
        layout=build_layout(list(modalities.values())),
        samples=tuple(SampleKey(0, slot, f"timed:{slot}") for slot in slots),
    )


def time_steps(spec: Spec, rank: int, world_size: int, device: torch.device) -> Timing:
    """Time the steps of `spec`. Collective; inside the process group if there are several ranks."""
    config = PRESETS[spec.preset]
    mesh = build_mesh(spec.parallel, world_size, rank, device)
    with torch.device("meta"):
        model = MMDiT(config)
    parallelize(model, mesh, spec.parallel, spec.precision, spec.remat, compile_blocks=False)
    model.to_empty(device=device)
    _fill(model, device)
    engine = NativeEngine(model, build_optimizer(OptimConfig(), model), mesh, spec.precision)
    outputs = [name for name, stream in config.streams.items() if stream.output]
    shapes = {
        name: TokenShape(config.streams[name].in_channels, config.stream_width(name))
        for name in outputs
    }
    step = Step(
        engine,
        build_objective(RectifiedFlowConfig(), shapes),
        [Ema(EmaConfig(), engine)],
        mesh,
        outputs,
        {},
        SEED,
        1.0,
    )
    mine = range(mesh.dp_index, spec.packs, mesh.dp_size)
    packs = [
        pack_of(config, spec, range(one * spec.segments, (one + 1) * spec.segments)) for one in mine
    ]
    seconds = []
    for number in range(NUM_WARM_STEPS + spec.num_steps):
        _wait(device)
        start_s = time.monotonic()
        step(number, packs, 1e-4)
        _wait(device)
        seconds.append(time.monotonic() - start_s)
    timed = tuple(seconds[NUM_WARM_STEPS:])
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Timing(statistics.median(timed), timed, peak)


@torch.no_grad()
def _fill(model: MMDiT, device: torch.device) -> None:
    """What is multiplied decides no time, as long as it is not all zeros."""
    for parameter in model.parameters():
        part = local_part(parameter)
        wave = torch.sin(torch.arange(part.numel(), device=device))
        part.copy_(0.02 * wave.view_as(part))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(spec_path: str, out_path: str) -> None:
    """Body of each rank; the first writes what the slowest and the fullest rank found."""
    spec = Spec.of_json(json.loads(Path(spec_path).read_text()))
    topology = read_topology()
    with process_group(topology, timeout_s=300) as device:
        timing = time_steps(spec, topology.rank, topology.world_size, device)
        mesh = build_mesh(spec.parallel, topology.world_size, topology.rank, device)
        every = mesh.gather_objects(timing)
    if topology.is_main:
        slowest = max(every, key=lambda one: one.step_s)
        peak = max(one.peak_bytes for one in every)
        Path(out_path).write_text(json.dumps(asdict(replace(slowest, peak_bytes=peak))) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
