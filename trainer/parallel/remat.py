"""Activation checkpointing: what blocks keep for their backward, and where.

none       everything, on the device
full       their inputs; the block is computed again
every_nth  the same for blocks 0, n, 2n, ...
selective  results of matrix products and of attention; what is cheap is computed again
offload    everything, in host memory
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from kinodit.models.errors import ConfigError

Forward = Callable[..., Any]


@dataclass(frozen=True)
class RematConfig:
    """mode: see above; n: for "every_nth"."""

    mode: Literal["none", "full", "every_nth", "selective", "offload"] = "none"
    n: int = 2

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"remat.n={self.n}: must be at least 1")

    def selected(self, num_blocks: int) -> range:
        """Indices of the blocks that do not simply keep everything, of `num_blocks`."""
        if self.mode == "none":
            return range(0)
        return range(0, num_blocks, self.n if self.mode == "every_nth" else 1)


def apply_remat(config: RematConfig, blocks: list[nn.Module]) -> None:
    """Make the selected `blocks` keep less, in place; module and parameter names stay.

    The block's forward is replaced, not the block: hooks that gather parameters stay outside of
    what is recomputed. Randomness is keyed by sample and drawn outside the model, so no generator
    state needs to be stashed.
    """
    for index in config.selected(len(blocks)):
        block = blocks[index]
        forward: Forward = block.forward
        if config.mode == "offload":
            forward = functools.partial(_offloaded, block, forward)
        else:
            selective: dict[str, Any] = {}
            if config.mode == "selective":
                selective["context_fn"] = _keep_products
            forward = functools.partial(
                checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **selective
            )
        setattr(block, "forward", forward)  # noqa: B010 - mypy refuses to assign a method


KEPT = frozenset(
    op
    for name in (
        "mm",
        "addmm",
        "_grouped_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
    for op in [getattr(torch.ops.aten, name).default]
)
"""Ops whose results are worth their memory: nearly all FLOPs of a block."""


def is_kept(op: Any) -> bool:
    """Whether "selective" keeps what `op` computes. The varlen kernels have a namespace of theirs.

    Collectives write into tensors that they are given, which cannot be kept: they talk again.
    """
    return op in KEPT or "varlen" in str(op)


def _keep_products() -> Any:
    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if is_kept(op) else CheckpointPolicy.PREFER_RECOMPUTE

    _OUTSIDE.depth = 0
    modes = create_selective_checkpoint_contexts(policy)
    for mode in modes:
        kind: Any = type(mode)
        mode.__class__ = _not_outside(kind)
    return modes


class _Outside:
    """Whether what runs now is no part of a block, though it runs inside of it."""

    depth = 0


_OUTSIDE = _Outside()


@functools.cache
def _not_outside(kind: Any) -> Any:
    """Like `kind`, one of the modes by which torch tells ops to keep from those to compute again.

    It counts the ops of each kind, and they must be as many the second time.
    """

    class NotOutside(kind):  # type: ignore[misc]
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if _OUTSIDE.depth:
                return op(*args, **(kwargs or {}))
            return super().__torch_dispatch__(op, types, args, kwargs)

    return NotOutside


def keep_hooks_outside(unit: nn.Module) -> None:
    """Let hooks that gather the parameters of `unit`, inside a block, be no part of the block.

    What they do depends on what was gathered ahead, and is not the same when it is computed again.
    They must be there already.
    """

    def begin(*_: Any) -> None:
        _OUTSIDE.depth += 1

    def end(*_: Any) -> None:
        _OUTSIDE.depth -= 1

    unit.register_forward_pre_hook(begin, prepend=True)
    unit.register_forward_pre_hook(end)
    unit.register_forward_hook(begin, prepend=True)
    unit.register_forward_hook(end)


SMALL_BYTES = 1 << 14
"""Tensors below this stay where they are: rows and statistics, not worth a copy."""


def _offloaded(block: nn.Module, forward: Forward, *args: Any) -> Any:
    """`forward(*args)` with what it keeps for the backward in host memory, its weights apart."""
    weights = {_storage(parameter) for parameter in block.parameters()}
    copies: dict[tuple[Any, ...], tuple[StorageWeakRef, Tensor]] = {}

    def pack(x: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if x.nbytes < SMALL_BYTES or _storage(x) in weights:
            return x
        # Several ops keep the same tensor: it goes once. Addresses are used again after a tensor
        # is gone, so one that is gone does not count.
        key = (_storage(x), x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
        known = copies.get(key)
        if known is not None and not known[0].expired():
            return x.device, known[1]
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        host.copy_(x, non_blocking=True)
        copies[key] = StorageWeakRef(x.untyped_storage()), host
        return x.device, host

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return forward(*args)


def _storage(x: Tensor) -> int:
    local = x.to_local() if isinstance(x, DTensor) else x
    return local.untyped_storage().data_ptr()
