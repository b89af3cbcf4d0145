"""Products in float8 by the hardware's matrix units, against those that torchao emulates."""

from __future__ import annotations

import pytest
import torch

from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.float8 import CAPABILITY, use_float8
from tests.support.synthetic import synthetic_pack, uneven_model

HAS_UNITS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_UNITS, reason="there is no CUDA device with float8 matrix units"),
]


@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
def test_products_are_those_that_are_emulated(kind: str) -> None:
    def predicted(emulate: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = uneven_model(width=64, num_heads=4)
        model.to("cuda", torch.bfloat16)
        precision = PrecisionConfig(compute="bfloat16", float8=kind)  # type: ignore[arg-type]
        use_float8(model, precision, 1, emulate=emulate)
        pack = synthetic_pack(0, [1, 2, 6], torch.bfloat16).to(torch.device("cuda"))
        out = model(pack)["video"]
        out.square().sum().backward()
        return out.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    (found, gradients), (expected, wanted) = predicted(False), predicted(True)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    for one, other in zip(gradients, wanted, strict=True):
        assert float((one - other).norm() / other.norm().clamp(min=1e-6)) < 0.1
