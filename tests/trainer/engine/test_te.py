"""TransformerEngine's linears, as far as they reach without CUDA: a stand-in with its interface."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron import core
from kinodit.trainer.engine.megatron.linears import part_sizes, swap_linears
from kinodit.trainer.engine.megatron.te import MULTIPLE, float8_context
from kinodit.trainer.engine.refusals import Wish, refusal
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.table import table_of
from tests.support.synthetic import synthetic_pack, tiny_model_config
from tests.support.wishes import cuda_wish

WISH = cuda_wish(MegatronConfig(linears="transformer_engine"))


class StandIn(nn.Module):
    """The part of transformer_engine.pytorch.Linear's documented interface that is used."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        params_dtype: torch.dtype,
        parallel_mode: None,
        device: str,
    ) -> None:
        super().__init__()
        assert device == "meta"
        shape = out_features, in_features
        self.weight = nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        self.sizes = in_features, out_features
        made = nn.Parameter(torch.empty(out_features, device=device)) if bias else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", made)

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 2 and x.shape[0] % MULTIPLE == 0
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The recipes of float8 contexts that were entered."""
    recipes: list[Any] = []
    package, pytorch, common, recipe = (
        ModuleType(f"transformer_engine{name}")
        for name in ("", ".pytorch", ".common", ".common.recipe")
    )

    @contextmanager
    def autocast(enabled: bool, recipe: Any) -> Iterator[None]:
        recipes.append((enabled, recipe))
        yield

    pytorch.Linear, pytorch.autocast = StandIn, autocast  # type: ignore[attr-defined]
    recipe.Float8CurrentScaling = lambda: "current scaling"  # type: ignore[attr-defined]
    for module in (package, pytorch, common, recipe):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield recipes


def test_large_matrices_are_transformer_engine_s_and_compute_the_same(entered: list[Any]) -> None:
    expected, swapped = (MMDiT(tiny_model_config(num_heads=4)) for _ in range(2))
    for model in (expected, swapped):
        initialize(model, seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    swap_linears(swapped, table_of(swapped), None, 1, use_te=True)
    kinds = {n: m for n, m in swapped.named_modules() if isinstance(m, StandIn)}
    assert len(kinds) > 10 and all("blocks" in n and "modulation" not in n for n in kinds)
    assert any(isinstance(m, core.ColumnParallelLinear) for m in swapped.modules())
    pack = synthetic_pack(0, [1, 2, 6], torch.float32)
    outs = [model(pack)["video"] for model in (expected, swapped)]
    torch.testing.assert_close(outs[1], outs[0])
    for out in outs:
        out.square().sum().backward()
    for one, other in zip(swapped.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_a_part_has_the_sizes_of_its_rank() -> None:
    linear = nn.Linear(24, 64)
    assert part_sizes(linear, "column", 4) == (24, 16)
    assert part_sizes(linear, "row", 4) == (6, 64)


def test_products_in_float8_run_in_its_context(entered: list[Any]) -> None:
    with float8_context("tensorwise")():
        pass
    assert entered == [(True, "current scaling")]
    with float8_context("none")():
        assert len(entered) == 1


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (replace(WISH, device="cpu"), "needs a CUDA device, found cpu"),
        (replace(WISH, precision=PrecisionConfig("float64", "float64")), "no kernels for"),
        (replace(WISH, engine=MegatronConfig(compile=True)), "engine.compile=false"),
        (
            replace(WISH, precision=PrecisionConfig(compute="bfloat16", float8="rowwise")),
            "has tensorwise",
        ),
    ],
)
def test_refused_with_the_reason(wish: Wish, reason: str) -> None:
    assert reason in refusal(wish)


def test_a_library_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in refusal(WISH)


@pytest.mark.parametrize(
    ("version", "ok"), [("2.10.1", False), ("2.11.0+abc", True), ("3.0", False)]
)
def test_versions_that_it_was_not_written_against_are_refused(
    version: str, ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    reason = refusal(WISH)
    assert (reason == "") == ok
    assert ok or (version in reason and "transformer_engine[pytorch]>=2.11,<3" in reason)


def test_what_is_there_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    float8 = PrecisionConfig(compute="bfloat16", float8="tensorwise")
    assert refusal(replace(WISH, precision=float8)) == ""
    assert refusal(replace(WISH, engine=MegatronConfig(), device="cpu")) == ""
