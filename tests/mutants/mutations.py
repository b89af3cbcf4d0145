"""Bugs that trainers of diffusion models have shipped, each put back by patching one place.

A mutation is a context manager that is entered on every rank before it trains.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from kinodit.data import assignment
from kinodit.models.diffusion import draws, objective
from kinodit.models.exchange import Spot
from kinodit.models.tokens import ModalityTokens, SampleKey, TokenBatch
from kinodit.trainer import ema
from kinodit.trainer import step as step_module
from kinodit.trainer.certify import trace as trace_module
from kinodit.trainer.certify.trace import Trace
from kinodit.trainer.certify.twin import Twin
from kinodit.trainer.engine import native
from kinodit.trainer.parallel import (
    apply,
    collectives,
    context,
    parts,
    ring,
    sequence,
    shard,
    tensor,
)
from kinodit.trainer.parallel.mesh import Mesh, ParallelConfig
from kinodit.trainer.parallel.sequence import Cut, CutLayout, Place

Mutation = Callable[[], AbstractContextManager[Any]]
Kind = tuple[int, bool]
"""The twin's key/value heads (0: as many as there are heads), and whether it has tasks."""


@dataclass(frozen=True)
class Mutant:
    """A bug, the layout that it shows in, and part of the line by which it must be told.

    num_kv_heads: the twin's; 0 leaves as many as there are heads
    explained:    part of where it must be said to begin, or of what it is likely to be
    has_tasks:    whether the twin has tasks
    """

    mutation: Mutation
    layout: str
    expected: str
    num_kv_heads: int = 0
    explained: str = ""
    has_tasks: bool = False

    @property
    def kind(self) -> Kind:
        """Which twin it shows in."""
        return self.num_kv_heads, self.has_tasks


MUTANTS: dict[str, Mutant] = {}


def original(module: Any, name: str) -> Any:
    """What a module calls by that name, wherever it was imported from."""
    return getattr(module, name)


def mutant(
    name: str,
    layout: str,
    expected: str,
    explained: str = "",
    num_kv_heads: int = 0,
    has_tasks: bool = False,
) -> Callable[[Mutation], Mutation]:
    """Enter a mutation in `MUTANTS`."""

    def enter(mutation: Mutation) -> Mutation:
        MUTANTS[name] = Mutant(mutation, layout, expected, num_kv_heads, explained, has_tasks)
        return mutation

    return enter


def mutated_trace(
    rank: int, world_size: int, name: str, twin: Twin, parallel: ParallelConfig, probed: bool
) -> Trace:
    """`trace` with a bug; no name is none."""
    with MUTANTS[name].mutation() if name else nullcontext():
        return trace_module.trace(rank, world_size, twin, parallel, probed=probed)


@mutant(
    "gradients summed over dp, not dp x cp",
    "dp_shard=2,cp=2",
    "gradients are off",
    "reduced over the wrong group",
)
def gradients_over_dp_only() -> AbstractContextManager[Any]:
    real = original(trace_module, "build_mesh")

    def build_mesh(config: ParallelConfig, *rest: Any) -> Mesh:
        mesh = real(config, *rest)
        shape = (config.dp_replicate, mesh.dp_size // config.dp_replicate, config.cp)
        names = ("dp_replicate", "dp_shard", "cp")
        every = init_device_mesh("cpu", shape, mesh_dim_names=names)
        without: Mesh = dataclasses.replace(mesh, device_mesh=every["dp_replicate", "dp_shard"])
        return without

    return patch.object(trace_module, "build_mesh", build_mesh)


def _counted(change: Callable[[Tensor, Mesh], Tensor]) -> AbstractContextManager[Any]:
    real = step_module.count_step

    def count_step(batches: Sequence[TokenBatch], names: Sequence[str], mesh: Mesh) -> Any:
        counts: Tensor = real(batches, names, mesh)
        tokens, rest = counts.split([len(names), 2])
        return torch.cat([change(tokens, mesh), rest])

    return patch.object(step_module, "count_step", count_step)


@mutant("loss divided by the tokens of dp, not of dp x cp", "cp=2", "loss is off")
def loss_over_dp_tokens() -> AbstractContextManager[Any]:
    return _counted(lambda count, mesh: count // mesh.place.num_shares)


@mutant(
    "loss divided by each rank's share of tokens",
    "dp_shard=2",
    "loss is off",
    "every gradient is 2.0",
)
def loss_over_own_tokens() -> AbstractContextManager[Any]:
    return _counted(lambda count, mesh: count // mesh.dp_size)


@mutant("loss divided by the last micro-batch's tokens", "dp_shard=2", "loss is off")
def last_micro_batch_counts() -> AbstractContextManager[Any]:
    real = step_module.count_step

    def count_step(batches: Sequence[TokenBatch], names: Sequence[str], mesh: Mesh) -> Any:
        return real(batches[-1:], names, mesh)

    return patch.object(step_module, "count_step", count_step)


@mutant(
    "gradients averaged over ranks",
    "dp_shard=2",
    "gradients are off",
    "every gradient is 0.5 times",
)
def gradients_averaged() -> AbstractContextManager[Any]:
    real = original(apply, "shard")

    def averaging(model: Any, *rest: Any) -> None:
        real(model, *rest)
        for unit in shard.units(model):
            unit.set_gradient_divide_factor(2.0)

    return patch.object(apply, "shard", averaging)


@mutant("gradients left on their ranks", "dp_shard=2", "no parameter has a gradient")
def gradients_not_reduced() -> AbstractContextManager[Any]:
    real = original(native, "set_gradient_sync")
    return patch.object(native, "set_gradient_sync", lambda model, enabled: real(model, False))


@mutant(
    "ring backward over the own keys only",
    "cp=2,ring=2",
    "gradients are off",
    "gradient of joint_blocks.1.streams",
)
@contextmanager
def ring_backward_over_own_keys() -> Iterator[None]:
    real, pairs = ring._Ring.backward, ring.pairs

    def own(layout: CutLayout, here: int, there: int) -> Any:
        return pairs(layout, here, there) if here == there else []

    def backward(ctx: Any, grad: Tensor) -> Any:
        with patch.object(ring, "pairs", own):
            return real(ctx, grad)

    with patch.object(ring._Ring, "backward", staticmethod(backward)):
        yield


@mutant("ring backward with each hop's own log-sum-exp", "cp=2,ring=2", "gradients are off")
def ring_backward_with_partial_lse() -> AbstractContextManager[Any]:
    flash = ring.FLASH["cpu"]

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        return flash.backward(grad, q, k, v, *flash.forward(q, k, v))

    return patch.dict(ring.FLASH, cpu=ring.Flash(flash.forward, backward))


@mutant(
    "ring averages partial outputs",
    "cp=2,ring=2",
    "loss is off",
    "order of tokens or heads, the mask",
)
def ring_averages_parts() -> AbstractContextManager[Any]:
    real = ring._merge

    def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        real(out, lse, part, torch.where(torch.isinf(lse), part_lse, lse))

    return patch.object(ring, "_merge", merge)


@mutant(
    "ring lets segments see each other",
    "cp=2,ring=2",
    "loss is off",
    "output of joint_blocks.0.attend",
)
def ring_ignores_segments() -> AbstractContextManager[Any]:
    real = ring.pairs

    def pairs(layout: CutLayout, here: int, there: int) -> Any:
        everyone = tuple(range(len(layout.lengths)))
        seen = dataclasses.replace(layout, visible=(everyone,) * len(everyone))
        return real(seen, here, there)

    return patch.object(ring, "pairs", pairs)


@mutant(
    "ring lets blocks of a segment see each other",
    "cp=2,ring=2",
    "loss is off",
    "output of joint_blocks.0.attend",
    has_tasks=True,
)
def ring_ignores_groups() -> AbstractContextManager[Any]:
    real = ring.pairs

    def pairs(layout: CutLayout, here: int, there: int) -> Any:
        owners = layout.segments
        own = tuple(
            tuple(index for index, other in enumerate(owners) if other == owner) for owner in owners
        )
        return real(dataclasses.replace(layout, visible=own), here, there)

    return patch.object(ring, "pairs", pairs)


@mutant("masks of tasks drawn by rank", "dp_shard=2", "has other latents, noise", has_tasks=True)
def masks_by_rank() -> AbstractContextManager[Any]:
    real = original(assignment, "sample_generator")

    def sample_generator(seed: int, key: SampleKey, purpose: str) -> Any:
        return real(seed + dist.get_rank(), key, purpose)

    return patch.object(assignment, "sample_generator", sample_generator)


def _seeded(offset: Callable[[Mesh], int]) -> AbstractContextManager[Any]:
    real = original(trace_module, "Step")

    def step(*parts: Any) -> Any:
        mesh, seed = parts[3], parts[6]
        return real(*parts[:6], seed + offset(mesh), *parts[7:])

    return patch.object(trace_module, "Step", step)


@mutant("seeds differ along cp", "cp=2", "has other latents, noise", "depend on the rank")
def seeds_differ_along_cp() -> AbstractContextManager[Any]:
    return _seeded(lambda mesh: mesh.place.index)


@mutant("seeds by data-parallel rank", "dp_shard=2", "has other latents, noise")
def seeds_by_rank() -> AbstractContextManager[Any]:
    return _seeded(lambda mesh: mesh.dp_index)


@mutant("equal draws for all samples", "dp_shard=2", "has other latents, noise")
def draws_equal_for_all() -> AbstractContextManager[Any]:
    real = original(draws, "sample_generator")

    def sample_generator(seed: int, key: SampleKey, purpose: str) -> Any:
        return real(seed, SampleKey(key.step, 0, ""), purpose)

    return patch.object(draws, "sample_generator", sample_generator)


@mutant("one noise level per pack", "dp_shard=2", "noise level")
def one_level_per_pack() -> AbstractContextManager[Any]:
    real = original(objective, "drawn_levels")

    def levels(*parts: Any) -> Tensor:
        t: Tensor = real(*parts)
        return t[:1].expand_as(t) if len(t) else t

    return patch.object(objective, "drawn_levels", levels)


@mutant("wrong token at an uneven cut", "cp=2", "loss is off")
def wrong_token_at_an_uneven_cut() -> AbstractContextManager[Any]:
    real = sequence.cut

    def cut(batch: TokenBatch, place: Place) -> Cut:
        made = real(batch, place)
        if place.share != place.num_shares - 1:
            return made
        rows = {}
        for name, mine in made.rows.items():
            is_last = torch.arange(len(mine)) == len(mine) - 1
            rows[name] = torch.where(is_last & (mine > 0), mine - 1, mine)
        return Cut(rows, made.layout)

    return patch.object(sequence, "cut", cut)


@mutant(
    "positions start anew on each rank",
    "cp=2",
    "loss is off",
    "output of joint_blocks.0.streams.video.attention",
)
def positions_start_anew() -> AbstractContextManager[Any]:
    def spot(tokens: ModalityTokens, rows: Tensor) -> Spot:
        return Spot(tokens.position[: len(rows)], tokens.level.index_select(0, rows))

    return patch.object(sequence, "_spot", spot)


@mutant(
    "heads come home in another order",
    "cp=2",
    "loss is off",
    "output of joint_blocks.0.streams.text.attention.out",
)
def heads_come_home_swapped() -> AbstractContextManager[Any]:
    real = context.scatter_tokens
    return patch.object(context, "scatter_tokens", lambda *parts: real(*parts).roll(1, dims=1))


@mutant("key heads repeated in turn", "cp=4", "loss is off", num_kv_heads=2)
def key_heads_repeated_in_turn() -> AbstractContextManager[Any]:
    def repeat(x: Tensor, ulysses: int) -> Tensor:
        return x if x.shape[1] % ulysses == 0 else x.repeat(1, ulysses // x.shape[1], 1)

    return patch.object(context, "_enough_heads", repeat)


@mutant("an average is not kept on one rank", "dp_shard=2", "averages are off", "the averages")
def average_of_one_rank_stands_still() -> AbstractContextManager[Any]:
    real = ema.Ema.update

    def update(self: ema.Ema, step: int) -> None:
        if dist.get_rank() != 1:
            real(self, step)

    return patch.object(ema.Ema, "update", update)


@mutant("clipped by the local norm", "dp_shard=2", "gradient norm is off", "gradients are right")
def clipped_by_the_local_norm() -> AbstractContextManager[Any]:
    def clip(self: native.NativeEngine, max_norm: float) -> Tensor:
        gradients = [
            parts.local_part(p.grad) for p in self.model.parameters() if p.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(gradients)
        scale = min(1.0, 0.1 / float(norm))
        for gradient in gradients:
            gradient.mul_(scale)
        return norm

    return patch.object(native.NativeEngine, "clip", clip)


@mutant("ranks read the same packs", "dp_shard=2", "never came")
def ranks_read_the_same_packs() -> AbstractContextManager[Any]:
    real = original(trace_module, "build_mesh")

    def build_mesh(*parts: Any) -> Mesh:
        mesh: Mesh = dataclasses.replace(real(*parts), dp_index=0)
        return mesh

    return patch.object(trace_module, "build_mesh", build_mesh)


@mutant("weights drawn by rank", "dp_replicate=2", "are off", "output of embeds.text")
def weights_drawn_by_rank() -> AbstractContextManager[Any]:
    real = original(trace_module, "initial_values")
    return patch.object(trace_module, "initial_values", lambda seed: real(seed + dist.get_rank()))


@mutant("gradients of whole parameters left on their tp ranks", "tp=2", "gradients are off")
def whole_gradients_not_summed() -> AbstractContextManager[Any]:
    return patch.object(native, "sum_whole_gradients", lambda *parts: None)


@mutant(
    "gradients of QK norms left on their tp ranks",
    "tp=2",
    "gradients are off",
    "that every rank has whole",
)
def qk_norm_gradients_not_summed() -> AbstractContextManager[Any]:
    real = original(native, "sum_whole_gradients")

    def without_norms(model: Any, *rest: Any) -> None:
        kept = {
            name: parts.local_part(parameter.grad).clone()
            for name, parameter in model.named_parameters()
            if re.search("[qk]_norm", name)
        }
        real(model, *rest)
        for name, gradient in kept.items():
            parts.local_part(model.get_parameter(name).grad).copy_(gradient)

    return patch.object(native, "sum_whole_gradients", without_norms)


@mutant("each tp rank adds the whole bias", "tp=2", "loss is off", "attention.out")
def bias_added_by_each_rank() -> AbstractContextManager[Any]:
    real = tensor._read

    def read(parameter: Any, split: Any, tp_mesh: Any) -> Tensor:
        return real(parameter, dataclasses.replace(split, summed=False), tp_mesh)

    return patch.object(tensor, "_read", read)


@mutant("tokens gathered, but their gradients not summed", "tp=2", "gradients are off")
def gathered_gradients_not_summed() -> AbstractContextManager[Any]:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        own, made = dist.get_rank(ctx.group), []
        for grad, rows in zip(grads, ctx.counts, strict=True):
            first = sum(rows[:own])
            made.append(grad[first : first + rows[own]])
        return None, None, None, *made

    return patch.object(collectives._GatherRows, "backward", staticmethod(backward))


@mutant("rotary angles of the own tokens for all that are seen", "tp=2", "loss is off")
def angles_of_other_tokens() -> AbstractContextManager[Any]:
    real = tensor.TokenExchange.seen

    def seen(self: tensor.TokenExchange, name: str, batch: TokenBatch) -> Any:
        spot = real(self, name, batch)
        return spot._replace(position=spot.position.roll(1, dims=0))

    return patch.object(tensor.TokenExchange, "seen", seen)


@mutant("columns of the modulation in another order", "tp=2", "loss is off")
def modulation_columns_swapped() -> AbstractContextManager[Any]:
    real = tensor.TokenExchange.join

    def join(self: tensor.TokenExchange, rows: Any) -> Any:
        return {name: part.roll(1, dims=1) for name, part in real(self, rows).items()}

    return patch.object(tensor.TokenExchange, "join", join)


@mutant("parameters counted twice in the gradient norm", "tp=2", "gradient norm is off")
def copies_counted_twice() -> AbstractContextManager[Any]:
    return patch.object(shard, "_num_copies", lambda tensor: 1)
