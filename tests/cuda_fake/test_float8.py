"""torchao's float8 on pretended CUDA tensors: products of full width are the hardware's."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from kinodit.launch.accept.pretended import forward
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.float8 import MATRICES, use_float8
from kinodit.trainer.parallel.mesh import ParallelConfig
from tests.cuda_fake.test_model import one_of_each_block, two_clips

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs the extra torchao"
)


@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("parallel", [ParallelConfig(dp_shard=1, tp=8)], ids=["tp8"])
def test_matrices_of_blocks_are_multiplied_by_the_hardware(
    parallel: ParallelConfig,
    kind: Literal["tensorwise", "rowwise"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = one_of_each_block("2b")
    precision = PrecisionConfig(compute="bfloat16", float8=kind)
    matrices: list[str] = []

    def before(model: torch.nn.Module, mesh: object) -> None:
        matrices.extend(name for name, _ in model.named_modules() if MATRICES.match(name))
        use_float8(model, precision, parallel.tp)

    multiply, found = torch._scaled_mm, []

    def multiplied(one: Tensor, other: Tensor, **settings: Any) -> Tensor:
        found.append((one.device.type, other.device.type, one.dtype, other.dtype))
        out: Tensor = multiply(one, other, **settings)
        return out

    monkeypatch.setattr(torch, "_scaled_mm", multiplied)
    forward(config, parallel, two_clips(config, torch.bfloat16), 3, before=before)
    both = torch.float8_e4m3fn, torch.float8_e4m3fn
    assert found == [("cuda", "cuda", *both)] * len(matrices) and len(matrices) == 9
