"""Counts that do not depend on the machine: kernels, bytes and host syncs of a step."""

from __future__ import annotations

from typing import Any

import torch
from contenders import WIDTH, Contender
from torch import Tensor
from torch._inductor.scheduler import (
    ExternKernelSchedulerNode,
    NopKernelSchedulerNode,
    Scheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

SYNCING = (
    "_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "masked_select",
    "unique",
    "bincount",
    "repeat_interleave.Tensor",
)
"""Parts of names of ops whose result, or its shape, the host must wait for."""


def activation_bytes(contender: Contender) -> int:
    """Bytes that autograd keeps between forward and backward, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in contender.model.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (x, storage.nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        contender.run()
    return sum(size for _, size in kept.values())


def compiled_block(contender: Contender) -> tuple[int, int]:
    """(pointwise kernels, bytes they read and write) of one joint block, forward and backward.

    As inductor schedules them; matrix products and attention are not counted.
    """
    counted: list[int] = []
    original = Scheduler.codegen

    def codegen(scheduler: Scheduler) -> Any:
        for node in scheduler.nodes:
            if not isinstance(node, ExternKernelSchedulerNode | NopKernelSchedulerNode):
                counted.append(int(node.get_read_write_buffers_sizes()))
        return original(scheduler)

    torch.compiler.reset()
    Scheduler.codegen = codegen
    block = contender.blocks[0]
    try:
        block.compile()
        with torch._inductor.config.patch(force_disable_caches=True):
            contender.run().square().mean().backward()
    finally:
        Scheduler.codegen = original
        block._compiled_call_impl = None
        contender.model.zero_grad(set_to_none=True)
        torch.compiler.reset()
    return len(counted), sum(counted)


def minimal_pointwise_bytes(contender: Contender) -> int:
    """Bytes that the pointwise work of a joint block must move, if all of it is fused.

    In [tokens, width] tensors, with matrix products and attention as barriers. Forward: norm 2
    (read x, write its modulated norm); q and k normed and turned 4; gate, add and norm 4; GELU 8;
    gate and add 3. Backward: gate 3 (read the gradient and the branch, write one); GELU 12; norm,
    gate 6; q and k 6; norm 4. Without RoPE and QK norm, q and k need no pass.
    """
    turned = 0 if contender.name.endswith(("sd3", "(sd3)")) else 10
    size = next(contender.model.parameters()).element_size()
    return (42 + turned) * contender.num_tokens * WIDTH * size


class _Syncs(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(part in func.name() for part in SYNCING):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def host_syncs(contender: Contender) -> list[str]:
    """Names of ops of one forward and backward pass that a host would wait for."""
    with _Syncs() as mode:
        contender.run().square().mean().backward()
    contender.model.zero_grad(set_to_none=True)
    return mode.found
