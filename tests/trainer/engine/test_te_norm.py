"""TransformerEngine's norm and rotation as far as they reach without CUDA: a stand-in for both."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT
from kinodit.models.norm import RMSNorm
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.megatron.te_norm import Angles, use_norms
from kinodit.trainer.engine.refusals import Wish, refusal
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.table import assign_splits, table_of
from tests.support.synthetic import synthetic_pack, tiny_model_config
from tests.support.wishes import cuda_wish

CONFIG = MegatronConfig(norms="transformer_engine")
WISH = cuda_wish(CONFIG)


class StandIn(nn.Module):
    """The part of transformer_engine.pytorch.RMSNorm's documented interface that is used."""

    def __init__(
        self, normalized_shape: int, *, eps: float, dtype: torch.dtype, device: str
    ) -> None:
        super().__init__()
        assert device == "meta"
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(normalized_shape, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1:] == self.weight.shape
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, *, tensor_format: str, interleaved: bool, fused: bool
) -> Tensor:
    """As the library documents it: `t` [s, b, h, d], `freqs` [s, 1, 1, d]; adjacent pairs turn."""
    assert tensor_format == "sbhd" and interleaved and fused
    assert freqs.dtype == torch.float32 and freqs.shape == (len(t), 1, 1, t.shape[-1])
    even, odd = t.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (t * freqs.cos() + turned * freqs.sin()).to(t.dtype)


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("", ".pytorch", ".pytorch.attention", ".pytorch.attention.rope")
    package, pytorch, attention, rope = (ModuleType(f"transformer_engine{name}") for name in names)
    pytorch.RMSNorm = StandIn  # type: ignore[attr-defined]
    rope.apply_rotary_pos_emb = apply_rotary_pos_emb  # type: ignore[attr-defined]
    for module in (package, pytorch, attention, rope):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize(("block_norm", "count"), [("layer", 19), ("rms", 28)])
def test_it_norms_and_turns_as_before(block_norm: str, count: int) -> None:
    config = tiny_model_config(num_heads=4, block_norm=block_norm, sandwich_norm=True)
    expected, swapped = (MMDiT(config) for _ in range(2))
    for model in (expected, swapped):
        initialize(model, seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    names = [name for name, module in swapped.named_modules() if isinstance(module, RMSNorm)]
    use_norms(swapped, MegatronConfig())
    assert not any(isinstance(module, StandIn) for module in swapped.modules())
    use_norms(swapped, CONFIG)
    found = [name for name, module in swapped.named_modules() if isinstance(module, StandIn)]
    assert found == names and len(names) == count
    pack = synthetic_pack(0, [1, 2, 6], torch.float32)
    for model in (expected, swapped):
        model(pack)["video"].square().sum().backward()
    torch.testing.assert_close(swapped(pack)["video"], expected(pack)["video"])
    for (name, one), (same, other) in zip(
        swapped.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name == same
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_they_are_laid_out_as_before() -> None:
    with torch.device("meta"):
        expected, swapped = (MMDiT(tiny_model_config(num_heads=4)) for _ in range(2))
    use_norms(swapped, CONFIG)
    both = [assign_splits(model, table_of(model), 2) for model in (expected, swapped)]
    assert both[0] == both[1]


def test_angles_are_made_once_for_each_table_and_go_with_it() -> None:
    angles = Angles()
    turns = torch.tensor([[0.5, -3.0], [2.0, 0.0]])
    rotary = torch.stack((turns.cos(), turns.sin()), dim=-1)
    first = angles.of(rotary)
    torch.testing.assert_close(first[:, 0, 0], turns.repeat_interleave(2, dim=1))
    assert angles.of(rotary) is first and angles.of(rotary.clone()) is not first
    del rotary
    assert len(angles._known) == 0


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (replace(WISH, device="cpu"), "needs a CUDA device, found cpu: set engine.norms=own"),
        (replace(WISH, precision=PrecisionConfig()), "kernels for precision.compute=bfloat16"),
        (replace(WISH, precision=PrecisionConfig("float64", "float64")), "no kernels for"),
    ],
)
def test_refused_with_the_reason(wish: Wish, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    assert reason in refusal(wish)
    assert refusal(WISH) == refusal(replace(wish, elsewhere=True)) == ""


def test_a_library_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "needs TransformerEngine, which is not installed" in refusal(WISH)
