"""What blocks keep and what they compute again, op by op; gradients are those of keeping all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kinodit.models.init import initialize
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.parallel import remat
from kinodit.trainer.parallel.apply import model_blocks
from kinodit.trainer.parallel.remat import RematConfig, apply_remat
from tests.support.synthetic import synthetic_pack, tiny_model_config


class Ops(TorchDispatchMode):
    """Counts what runs, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def gradients(config: RematConfig) -> tuple[dict[str, Tensor], Counter[str]]:
    model = MMDiT(tiny_model_config(num_single_blocks=2)).double()
    initialize(model, seed=1)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            ramp = torch.arange(parameter.numel()) + index
            parameter.add_(0.02 * torch.sin(ramp).view_as(parameter))
    apply_remat(config, model_blocks(model))
    batch = synthetic_pack(0, [1, 2, 6])
    with Ops() as ops:
        model(batch)["video"].square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, ops.counts


def num_products(counts: Counter[str]) -> int:
    return sum(counts[f"aten.{name}"] for name in ("mm", "addmm"))


ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("mode", ["full", "every_nth", "selective", "offload"])
def test_gradients_do_not_change(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remat, "SMALL_BYTES", 0)
    expected, _ = gradients(RematConfig())
    found, _ = gradients(RematConfig(mode))  # type: ignore[arg-type]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_full_computes_again_and_selective_what_is_cheap() -> None:
    plain, full, nth, selective = (
        gradients(RematConfig(mode))[1] for mode in ("none", "full", "every_nth", "selective")
    )
    assert num_products(full) > num_products(nth) > num_products(plain)
    assert full[ATTENTION] == 2 * plain[ATTENTION]
    assert nth[ATTENTION] == 1.5 * plain[ATTENTION]
    assert num_products(selective) == num_products(plain)
    assert selective[ATTENTION] == plain[ATTENTION]
    assert selective["aten.gelu"] == full["aten.gelu"] == 2 * plain["aten.gelu"]


def test_offloaded_tensors_are_copied_once_and_weights_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remat, "SMALL_BYTES", 0)
    linear = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))

    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = linear

        def forward(self, x: Tensor) -> Tensor:
            y = x.sin()
            return sum((part(y) for part in self.parts), torch.zeros(()))

    block = Shared()
    apply_remat(RematConfig("offload"), [block])
    with Ops() as ops:
        out = block(torch.randn(4, 8, requires_grad=True))
    # The input, kept by the sine, and its sine, kept by three matrices.
    assert ops.counts["aten.copy_"] == 2
    out.sum().backward()


def test_small_tensors_stay() -> None:
    block = torch.nn.Linear(8, 8)
    apply_remat(RematConfig("offload"), [block])
    with Ops() as ops:
        block(torch.randn(4, 8))
    assert ops.counts["aten.copy_"] == 0
