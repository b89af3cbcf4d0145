"""The forward on pretended CUDA tensors: mixed devices and anything that needs a value raise."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kinodit.models.mmdit import MMDiT
from kinodit.models.tokens import TokenBatch
from tests.models.packs import pack
from tests.models.test_mmdit import VARIANTS, causal, samples


class Ops(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def pretend(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cuda")


def on_cuda(batch: TokenBatch) -> TokenBatch:
    layout = batch.layout
    assert layout.order is not None and layout.inverse is not None
    return TokenBatch(
        modalities={name: tokens.map(pretend) for name, tokens in batch.modalities.items()},
        level_segment=pretend(batch.level_segment),
        level_t=pretend(batch.level_t),
        conditions={name: pretend(x) for name, x in batch.conditions.items()},
        layout=dataclasses.replace(
            layout, order=pretend(layout.order), inverse=pretend(layout.inverse)
        ),
        samples=batch.samples,
    )


@pytest.mark.parametrize("variant", ["refiner", "next_dit", "gqa_swiglu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("per_frame", [False, True], ids=["full", "causal"])
def test_the_forward_never_waits_for_the_device(
    variant: str, dtype: torch.dtype, per_frame: bool
) -> None:
    config = VARIANTS[variant]
    batch = pack(samples(per_frame), causal if per_frame else lambda query, key: True)
    with torch.device("meta"):
        model = MMDiT(dataclasses.replace(config, head_dim=16, width=64)).to(dtype)
    with FakeTensorMode(), torch.no_grad():
        weights = {name: pretend(x) for name, x in model.named_parameters()}
        moved = on_cuda(batch)
        with Ops() as ops:
            outputs = torch.func.functional_call(model, weights, (moved,))
    for name, output in outputs.items():
        assert output.device.type == "cuda"
        assert output.dtype == dtype
        assert output.shape == batch.modalities[name].latents.shape
    is_varlen = dtype == torch.bfloat16 and (not per_frame or variant == "refiner")
    assert any("varlen" in name for name in ops.names) == is_varlen
