"""Products in float8: which matrices, how far off, refused where there is no hardware for them.

torchao can emulate the products, so that all but the kernel itself runs here.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinodit.models.errors import ConfigError, MissingExtraError
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.engine.config import DeepSpeedConfig, NativeConfig
from kinodit.trainer.engine.refusals import Wish, check_wish, refusal
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.float8 import use_float8
from kinodit.trainer.parallel.mesh import ParallelConfig, build_mesh
from kinodit.trainer.parallel.remat import RematConfig
from tests.support.ranks import Ranks
from tests.support.synthetic import synthetic_pack, uneven_model

FLOAT8 = PrecisionConfig(compute="bfloat16", float8="tensorwise")
WISH = Wish(
    NativeConfig(), OptimConfig(), ParallelConfig(), FLOAT8, RematConfig(), 1, "cuda", (9, 0)
)


def made(**settings: Any) -> MMDiT:
    model = uneven_model(width=64, num_heads=4)
    if settings:
        use_float8(model, settings.pop("precision"), 1, **settings)
    return model


def trained(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    prediction = model(synthetic_pack(0, [1, 2, 6], torch.float32))["video"]
    prediction.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return prediction.detach(), gradients


@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
def test_emulated_products_are_near_and_not_the_same(kind: Any) -> None:
    plain = made()
    rounded = made(precision=replace(FLOAT8, float8=kind), emulate=True)
    names = {n for n, m in rounded.named_modules() if type(m).__name__ == "Float8Linear"}
    assert len(names) > 10 and all("blocks" in name and "modulation" not in name for name in names)
    for (name, one), (other_name, other) in zip(
        plain.named_parameters(), rounded.named_parameters(), strict=True
    ):
        assert name == other_name and torch.equal(one, other)
    (expected, gradients), (found, rounded_gradients) = trained(plain), trained(rounded)
    assert 1e-4 < float((found - expected).norm() / expected.norm()) < 0.1
    for name, gradient in gradients.items():
        error = float((rounded_gradients[name] - gradient).norm() / gradient.norm())
        # Several products in a row, gradients rounded to two bits of mantissa.
        assert error < 0.4, name


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (replace(WISH, device="cpu"), "needs a CUDA device, found cpu"),
        (replace(WISH, capability=(8, 0)), "found 8.0"),
        (replace(WISH, engine=DeepSpeedConfig()), "kernels of deepspeed"),
        (replace(WISH, precision=PrecisionConfig(float8="rowwise")), "precision.compute=bfloat16"),
    ],
)
def test_refused_before_anything_is_made(wish: Wish, reason: str) -> None:
    assert reason in refusal(wish)
    with pytest.raises(ConfigError, match=r"precision\.float8"):
        check_wish(wish)


def test_what_the_hardware_has_is_not_refused() -> None:
    assert refusal(WISH) == "" and refusal(replace(WISH, capability=(8, 9))) == ""


def test_dims_that_are_not_multiplied_and_a_missing_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="multiples of 16 on each of 8 tp"):
        use_float8(made(), FLOAT8, 8)

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r"kinodit\[torchao\]"):
        use_float8(made(), FLOAT8, 1)


def split_case(rank: int, world_size: int, parallel: ParallelConfig) -> float:
    """How far the prediction under a layout is from that of one process, emulated."""
    expected, _ = trained(made(precision=FLOAT8, emulate=True))
    model = made(precision=FLOAT8, emulate=True)
    mesh = build_mesh(parallel, world_size, rank, torch.device("cpu"))
    parallelize(model, mesh, parallel, PrecisionConfig(), RematConfig(), compile_blocks=False)
    from kinodit.trainer.engine.native import NativeEngine
    from kinodit.trainer.optim import build_optimizer

    engine = NativeEngine(model, build_optimizer(OptimConfig(), model), mesh, PrecisionConfig())
    with engine.inference() as forward:
        found = forward(synthetic_pack(0, [1, 2, 6], torch.float32))["video"]
    return float((found - expected).norm() / expected.norm())


@pytest.mark.gloo
@pytest.mark.parametrize(
    "parallel", [ParallelConfig(dp_shard=2), ParallelConfig(dp_shard=1, tp=2)], ids=str
)
def test_it_goes_with_sharding_and_splitting(parallel: ParallelConfig, two: Ranks) -> None:
    """One scale for a tensor is one for each tp rank's part: near, as rounding is."""
    assert importlib.util.find_spec("torchao") is not None
    for error in two.run(split_case, parallel):
        assert error < (1e-5 if parallel.tp == 1 else 0.1)
