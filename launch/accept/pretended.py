"""One rank's forward on pretended CUDA tensors: what a machine without a device can show of one.

Tensors have shapes, formats and a device, and no memory; messages go to a group that sends nothing.
Mixed devices, kernels that do not take what they are given and anything that needs a value raise.
Nothing is computed, so nothing is measured. (torch's autograd has no CUDA on such a machine, and
FSDP2 asks for a device: the backward and the sharding of parameters are left out.)
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from kinodit.launch.topology import pretended_group
from kinodit.models.attention import fits_flash
from kinodit.models.config import MMDiTConfig
from kinodit.models.exchange import Spot
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe import experts
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.certify.layouts import num_ranks
from kinodit.trainer.parallel import expert, ring, tensor
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.mesh import Mesh, ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.parallel.sequence import CutLayout, cut

Prepare = Callable[[MMDiT, Mesh], None]


@dataclass(frozen=True)
class Pretended:
    """shapes: stream -> of its prediction; ops: how often each ran, by its full name."""

    shapes: dict[str, tuple[int, ...]]
    ops: Counter[str]

    def messages(self, kind: str) -> int:
        """Collectives whose name has `kind` in it: "alltoall", "allgather", ..."""
        return sum(count for op, count in self.ops.items() if op.startswith("c10d") and kind in op)


def forward(
    config: MMDiTConfig,
    parallel: ParallelConfig,
    whole: TokenBatch,
    rank: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    before: Prepare | None = None,
    after: Prepare | None = None,
) -> Pretended:
    """The forward of `rank` on its part of the pack `whole`, which is on the host.

    `parallel.dp_shard` must be given. This process must be in no process group.

    before, after: what an engine does with the model, on the meta device, before and after it is
                   laid out
    """
    with pretended_group(rank, num_ranks(parallel)):
        mesh = build_mesh(parallel, num_ranks(parallel), rank, torch.device("cpu"))
        with torch.device("meta"):
            model = MMDiT(config)
        if before is not None:
            before(model, mesh)
        unsharded = dataclasses.replace(mesh, device_mesh=None)
        parallelize(
            model, unsharded, parallel, PrecisionConfig(), RematConfig(), compile_blocks=False
        )
        if after is not None:
            after(model, mesh)
        model.to(dtype)
        own = cut(whole, mesh.place).of(whole) if mesh.place.num_shares > 1 else whole
        return _run(model, own, dtype, is_split=mesh.tp_mesh is not None)


def _run(model: MMDiT, own: TokenBatch, dtype: torch.dtype, *, is_split: bool) -> Pretended:
    def local(parameter: Tensor, *rest: object) -> Tensor:
        part: Tensor = parameter._local_tensor  # type: ignore[attr-defined]
        return pretend(part)

    with ExitStack() as stack:
        stack.enter_context(patch.object(ring, "Transfer", _Arrived))
        stack.enter_context(patch.object(experts, "looped_product", _looped))
        stack.enter_context(patch.object(expert, "rows_of", _even))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())
        ops = stack.enter_context(Ops())
        batch = on_cuda(own).in_dtype(dtype)
        for module in model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, pretend(buffer))
        if is_split:
            with patch.object(tensor, "_local", local):
                outputs = model(batch)
        else:
            # Experts that ranks have between them are DTensors; what a rank holds computes.
            parameters = dict(model.named_parameters())
            weights = {
                name: local(x) if isinstance(x, DTensor) else pretend(x)
                for name, x in parameters.items()
            }
            outputs = torch.func.functional_call(model, weights, (batch,))
    for name, output in outputs.items():
        assert output.device.type == "cuda" and output.dtype == dtype, name
    return Pretended({name: tuple(x.shape) for name, x in outputs.items()}, ops.counts)


def _looped(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """In the place of `looped_product`: nobody knows the counts of tokens that are not there."""
    return x.new_empty(len(x), weight.shape[1])


def _even(sent: Tensor, arriving: Tensor, num_rows: int) -> tuple[list[int], list[int]]:
    """In the place of `rows_of`: as many for each rank as there can be, and as many from it."""
    num_ranks = len(sent)
    rows = [(num_rows + rank) // num_ranks for rank in range(num_ranks)]
    return rows, rows


def pretend(x: Tensor) -> Tensor:
    """A pretended CUDA tensor like `x`. Within FakeTensorMode."""
    return torch.empty(x.shape, dtype=x.dtype, device="cuda")


def on_cuda(batch: TokenBatch) -> TokenBatch:
    """The batch, whole or dealt out, with pretended tensors. Within FakeTensorMode."""
    layout = batch.layout
    if layout.order is not None and layout.inverse is not None:
        layout = dataclasses.replace(
            layout, order=pretend(layout.order), inverse=pretend(layout.inverse)
        )
    if isinstance(layout, CutLayout):
        layout = dataclasses.replace(
            layout,
            spots={name: Spot(*map(pretend, spot)) for name, spot in layout.spots.items()},
            wholes={
                name: (tokens.map(pretend), pretend(own))
                for name, (tokens, own) in layout.wholes.items()
            },
        )
    return TokenBatch(
        modalities={name: tokens.map(pretend) for name, tokens in batch.modalities.items()},
        level_segment=pretend(batch.level_segment),
        level_t=pretend(batch.level_t),
        conditions={name: pretend(x) for name, x in batch.conditions.items()},
        layout=layout,
        samples=batch.samples,
    )


class Ops(TorchDispatchMode):
    """Counts the ops that run while it is entered, by name.

    Flash kernels are asked whether they would take what they get: pretended ones take anything.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.counts[name] += 1
        if "varlen_attn" in name or "scaled_dot_product_flash_attention" in name:
            q = args[0]
            assert q.device.type != "cuda" or fits_flash(q.dtype, q.shape[-1]), (
                f"{name} does not take {q.dtype} with a head dim of {q.shape[-1]}"
            )
        return func(*args, **(kwargs or {}))


class _Arrived:
    """In the place of `Transfer`: batched transfers ask the device driver, which is not there."""

    def __init__(self, x: Tensor, to: int, receive_shape: Sequence[int], *rest: object) -> None:
        self._out = x.new_empty(receive_shape)

    def wait(self) -> Tensor:
        return self._out
