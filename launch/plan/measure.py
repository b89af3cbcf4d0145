"""The same figures as a plan's, of the real thing: small models that really run, on CPU ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kinodit.launch.plan.activations import activations
from kinodit.launch.plan.blocks import Pass
from kinodit.launch.plan.communication import Messages, traffic
from kinodit.launch.plan.estimate import copied_gradients, copies_tokens, crowd
from kinodit.launch.plan.ops import Sizes
from kinodit.launch.plan.state import State, Weights
from kinodit.launch.plan.watch import Watch
from kinodit.launch.plan.workload import Workload
from kinodit.models.config import ConditionConfig, MMDiTConfig, StreamConfig
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.tokens import ModalityTokens, Role, SampleKey, TokenBatch, build_layout
from kinodit.trainer.ema import Ema, EmaConfig
from kinodit.trainer.engine.base import Predictions
from kinodit.trainer.engine.build import build_engine, build_mesh
from kinodit.trainer.engine.config import EngineConfig, NativeConfig
from kinodit.trainer.engine.native import NativeEngine
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.deferred import initial_values
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.sequence import cut
from kinodit.trainer.parallel.shard import units
from kinodit.trainer.parallel.traffic import CONTROL, Traffic
from kinodit.trainer.parallel.volume import Formats

NATIVE = NativeConfig()
TEXT = StreamConfig(48, output=False, position="none")
VIDEO = StreamConfig(32)


def _family(**changes: object) -> MMDiTConfig:
    fields: dict[str, object] = {
        "streams": {"text": TEXT, "video": VIDEO},
        "conditions": {"text_pooled": ConditionConfig(48)},
        "width": 96,
        "num_heads": 4,
        "num_double_blocks": 2,
        "num_single_blocks": 3,
        **changes,
    }
    return MMDiTConfig(**fields)  # type: ignore[arg-type]


def families() -> dict[str, Workload]:
    """Small workloads of the model's kinds: blocks, norms, heads, activations, modulation."""
    tokens = {"text": 40, "video": 160}
    image = StreamConfig(32, position="sincos_2d")
    sd3 = _family(
        streams={"video": image, "text": TEXT},
        num_double_blocks=4,
        num_single_blocks=0,
        qk_norm="none",
    )
    next_dit = _family(
        activation="swiglu", block_norm="rms", sandwich_norm=True, modulation="scale_gate"
    )
    experts = ExpertsConfig(num_experts=4, top_k=2, expert_ratio=2.0, shared_ratio=1.0)
    return {
        "sd3": Workload(sd3, {"video": 160, "text": 40}, segments=2, packs=8),
        "flux": Workload(_family(), tokens, segments=1, packs=8),
        "next_dit": Workload(next_dit, tokens, segments=2, packs=8),
        "gqa": Workload(_family(num_kv_heads=2), tokens, segments=2, packs=8),
        "lora_per_frame": Workload(
            _family(modulation_rank=8), tokens, segments=2, packs=8, levels=4
        ),
        "experts": Workload(
            _family(experts={"video": experts, "all": experts}), tokens, segments=2, packs=8
        ),
    }


@dataclass(frozen=True)
class Measured:
    """Of one rank. state: bytes; peak: of activations; host: offloaded at once, at most.

    accumulated: bytes of gradients that are kept whole between micro-batches
    index: among the ranks that parameters are cut over
    messages, received: label -> how many, and their bytes, in a step of two micro-batches
    """

    state: State
    peak: int
    host: int
    accumulated: int
    index: int
    messages: dict[str, int]
    received: dict[str, int]


def measure(
    rank: int,
    world_size: int,
    workload: Workload,
    parallel: ParallelConfig,
    remat: RematConfig,
    compute: str = "float32",
    engine_config: EngineConfig = NATIVE,
) -> Measured:
    """A step of `workload` as the trainer runs it: every storage is counted. Collective.

    engine_config: the native engine, or another that shards by FSDP2
    """
    precision = PrecisionConfig(compute=compute)  # type: ignore[arg-type]
    mesh = build_mesh(parallel, engine_config, world_size, rank, torch.device("cpu"))
    with torch.device("meta"):
        model = MMDiT(workload.model)
    wish = Wish(engine_config, OptimConfig(), parallel, precision, remat, world_size)
    engine = build_engine(model, initial_values(0), mesh, wish)
    assert isinstance(engine, NativeEngine), engine_config
    optimizer = engine._optimizer
    ema = Ema(EmaConfig(), engine)
    batch = pretended_pack(workload)
    if mesh.place.is_cut:
        batch = cut(batch, mesh.place).of(batch)
    peak, host = watched_pass(engine, batch, offloads=remat.mode == "offload")
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    parameters, reduced = storage_bytes(model.parameters()), storage_bytes(gradients)
    engine.step(0.1)
    with Traffic() as counted:
        engine.forward_backward(batch, squared_error, last=False)
        accumulated = storage_bytes(_unreduced(model))
        engine.forward_backward(batch, squared_error, last=True)
    state = State(
        parameters, reduced, storage_bytes(optimizer.tensors()), storage_bytes(ema.average.values())
    )
    index = rank // parallel.tp % (world_size // parallel.dp_replicate // parallel.tp)
    totals = {label: counted.total(label) for label in counted.labels - {CONTROL}}
    return Measured(
        state,
        peak,
        host,
        accumulated,
        index,
        messages={label: count for label, (count, _) in totals.items()},
        received={label: size for label, (_, size) in totals.items()},
    )


def _unreduced(model: torch.nn.Module) -> list[Tensor]:
    """Gradients that FSDP2 adds up whole until the last micro-batch."""
    found = []
    for unit in units(model):
        group = unit._get_fsdp_state()._fsdp_param_group
        for part in group.fsdp_params if group is not None else []:
            whole = getattr(part, "unsharded_accumulated_grad", None)
            if whole is None and hasattr(part, "_unsharded_param"):
                whole = part._unsharded_param.grad
            if whole is not None:
                found.append(whole)
    return found


def planned_pass(
    workload: Workload, parallel: ParallelConfig, item: int, engine: EngineConfig = NATIVE
) -> Pass:
    """What a plan takes the pass for, with a CPU's kernels."""
    sizes = Sizes(item, workload.segments * workload.levels, cuda=False)
    around = crowd(workload, parallel, copied=copies_tokens(engine))
    return Pass(workload.model, around, sizes, workload.segments)


def planned_peak(
    workload: Workload,
    parallel: ParallelConfig,
    remat: RematConfig,
    item: int,
    engine: EngineConfig = NATIVE,
) -> int:
    """What a plan says of the same pass: most bytes of activations and copied gradients."""
    copied = copied_gradients(Weights(workload.model), parallel.tp, item, engine)
    return activations(planned_pass(workload, parallel, item, engine), remat).peak + copied


def planned_traffic(
    workload: Workload,
    parallel: ParallelConfig,
    remat: RematConfig,
    formats: Formats,
    engine: EngineConfig = NATIVE,
) -> list[Messages]:
    """What a plan says of the messages of a step of two micro-batches, a pack each."""
    num_ranks = parallel.dp_shard * parallel.cp
    units = Weights(workload.model).units(parallel.tp, num_ranks, parallel.ep)
    work = planned_pass(workload, parallel, formats.compute, engine)
    return traffic(work, units, parallel, remat, formats, passes=2)


def planned_state(workload: Workload, parallel: ParallelConfig, index: int) -> State:
    """What a plan says of a rank's state: float32, one average."""
    return Weights(workload.model).state(parallel, 4, 1, index)


def squared_error(predictions: Predictions) -> Tensor:
    """A loss: the mean squared distance of each stream from 1, summed over streams."""
    terms = []
    for prediction in predictions.values():
        wide = torch.promote_types(prediction.dtype, torch.float32)
        target = torch.ones(prediction.shape, dtype=wide)
        terms.append((prediction.to(wide) - target).square().mean())
    return torch.stack(terms).sum()


def watched_pass(
    engine: NativeEngine, batch: TokenBatch, *, offloads: bool = False
) -> tuple[int, int]:
    """(most bytes of activations at once, of them on the host) in a forward and backward.

    Parameters, gathered or not, gradients and FSDP2's buffers are left out.
    """
    # What `trainer/parallel/remat.py` copies to the host is the only memory it asks for by name.
    watch = Watch("aten::empty.memory_format" if offloads else "")
    watch.leave_out(engine.model.parameters())
    with watch:
        # The engine casts latents, which copies them only where the format changes.
        copied = batch.with_latents(
            {name: tokens.latents.clone() for name, tokens in batch.modalities.items()}
        )
        engine.forward_backward(copied, squared_error, last=True)
        del copied
    watch.leave_out(p.grad for p in engine.model.parameters() if p.grad is not None)
    return watch.peak(), watch.peak(host=True)


def pretended_pack(workload: Workload) -> TokenBatch:
    """A pack of the workload's sizes, of zeros."""
    model, count, levels = workload.model, workload.segments, workload.levels
    modalities = {}
    for name, stream in model.streams.items():
        length = workload.tokens[name]
        segment = torch.arange(count).repeat_interleave(length)
        total = len(segment)
        role = Role.NOISED if stream.output else Role.CLEAN
        modalities[name] = ModalityTokens(
            latents=torch.zeros(total, stream.in_channels),
            segment=segment,
            group=torch.zeros(total, dtype=torch.int64),
            position=torch.zeros(total, 3),
            role=torch.full((total,), int(role), dtype=torch.int8),
            level=segment * levels + torch.arange(total) % length * levels // length,
            weight=torch.full((total,), float(stream.output)),
        )
    return TokenBatch(
        modalities=modalities,
        level_segment=torch.arange(count * levels) // levels,
        level_t=torch.zeros(count * levels),
        conditions={
            name: torch.zeros(count, condition.dim) for name, condition in model.conditions.items()
        },
        layout=build_layout(list(modalities.values())),
        samples=tuple(SampleKey(0, slot, f"pretended:{slot}") for slot in range(count)),
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that this rank's parts of `tensors` lie in."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in local}
    return sum(storages.values())
