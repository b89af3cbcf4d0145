"""One step: what the host waits for, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kinodit.models.diffusion.objective import RectifiedFlowConfig, build_objective
from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.engine.native import NativeEngine
from kinodit.trainer.optim import OptimConfig, build_optimizer
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.step import Step
from tests.support.synthetic import synthetic_pack, tiny_model_config

READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu"}
seen: list[str] = []


class OnDevice(Tensor):
    """As if the device were still working at it: notes when somebody waits for its values."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            seen.append(name)
        plain = super().__torch_function__
        return plain(func, types, args, dict(kwargs or {}))  # type: ignore[no-untyped-call]


class Slow(Mesh):
    """One process, whose device answers late."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.as_subclass(OnDevice)


def test_the_host_waits_once_and_in_the_gate() -> None:
    mesh = Slow(torch.device("cpu"))
    model = MMDiT(tiny_model_config(num_heads=4))
    initialize(model, seed=1)
    precision = PrecisionConfig()
    engine = NativeEngine(model, build_optimizer(OptimConfig(), model), mesh, precision)
    objective = build_objective(RectifiedFlowConfig(prediction="velocity"))
    step = Step(engine, objective, [], mesh, ["video"], {"video": 0.7}, 3, 1.0)
    batches = [synthetic_pack(0, [0, 1], torch.float32), synthetic_pack(0, [2], torch.float32)]

    def gate(losses: Tensor, grad_norm: Tensor) -> bool:
        seen.append("gate")
        return True

    seen.clear()
    result = step(0, batches, 1e-3, gate)
    assert seen == ["gate", "tolist"]
    assert result.counts.num_samples == 3
    assert result.counts.num_tokens == sum(batch.num_tokens for batch in batches)
