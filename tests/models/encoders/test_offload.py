"""Weights that are on the device only while they are used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kinodit.models.encoders.offload import Resident

CPU = torch.device("cpu")


def module() -> nn.Module:
    linear = nn.Linear(3, 2)
    linear.register_buffer("seen", torch.ones(2))
    return linear.requires_grad_(False)


def places(part: nn.Module) -> list[int]:
    return [tensor.data_ptr() for tensor in (*part.parameters(), *part.buffers())]


def test_a_use_works_on_a_copy_and_drops_it() -> None:
    part = module()
    before, values = places(part), [tensor.clone() for tensor in part.state_dict().values()]
    resident = Resident(part, CPU, offload=True)
    with resident.use():
        assert not set(places(part)) & set(before)
        for tensor, value in zip(part.state_dict().values(), values, strict=True):
            assert torch.equal(tensor, value)
    assert places(part) == before
    with pytest.raises(ZeroDivisionError), resident.use():
        raise ZeroDivisionError
    assert places(part) == before


def test_without_it_nothing_moves() -> None:
    part = module()
    before = places(part)
    with Resident(part, CPU, offload=False).use():
        assert places(part) == before
