"""Bits that differ between copies are found, whichever they are, and nothing else is."""

from __future__ import annotations

import io
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kinodit.trainer.config import load_config
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.resilience.checksum import bit_sums, check_replicas, differing
from kinodit.trainer.run import train
from kinodit.trainer.topology import Topology
from tests.support.recipes import tiny_recipe, write_dataset

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype: torch.dtype) -> None:
    values = torch.randn(21, dtype=torch.float64).to(dtype)
    before = bit_sums(values)
    bits = values.element_size() * 8
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[values.element_size()]
    for element in range(21):
        for bit in range(bits):
            flipped = values.clone()
            mask = torch.tensor(1 << bit if bit < bits - 1 else -(1 << bit), dtype=integers)
            flipped.view(integers)[element].bitwise_xor_(mask)
            assert not torch.equal(bit_sums(flipped), before), (element, bit)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(0, 39))
def test_equal_bits_have_equal_sums_and_places_count(size: int, place: int) -> None:
    values = torch.arange(1.0, 1.0 + size)
    assert torch.equal(bit_sums(values), bit_sums(values.clone()))
    if place + 1 < size:
        swapped = values.clone()
        swapped[place], swapped[place + 1] = values[place + 1], values[place]
        assert not torch.equal(bit_sums(swapped), bit_sums(values))


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_a_part_lies_in_memory_does_not_count(dtype: torch.dtype) -> None:
    held = torch.randn(60, dtype=torch.float64).to(dtype)
    for start in range(9):
        assert torch.equal(bit_sums(held[start:50]), bit_sums(held[start:50].clone()))


def test_nan_is_compared_by_its_bits() -> None:
    values = torch.full((3,), float("nan"))
    assert torch.equal(bit_sums(values), bit_sums(values.clone()))


def test_the_majority_is_right_and_a_tie_names_all() -> None:
    shard: tuple[int, ...] = (-1, 0)
    other: tuple[int, ...] = (-1, 1)
    agree = [{shard: 5}, {other: 7}, {shard: 5}, {other: 7}, {shard: 5}]
    assert differing(agree) == {}
    assert differing([*agree[:4], {shard: 6}]) == {shard: [4]}
    assert differing([{shard: 5}, {shard: 6}]) == {shard: [0, 1]}
    assert differing([{(): 1}]) == {}


def test_one_process_has_nobody_to_differ_from() -> None:
    check_replicas({"a": torch.ones(3)}, Mesh(torch.device("cpu")), 0)


def test_what_is_saved_is_not_checked_twice(tmp_path: Path) -> None:
    checked: list[int] = []
    recipe = tiny_recipe(
        tmp_path,
        write_dataset(tmp_path),
        run={"steps": 6, "out_dir": str(tmp_path / "runs")},
        resilience={"checksum_every_steps": 2},
        checkpoint={"every_steps": 3},
    )
    with patch("kinodit.trainer.loop.check_replicas", lambda _, __, step: checked.append(step)):
        train(load_config(recipe), Topology(0, 1, 0), torch.device("cpu"), io.StringIO())
    assert checked == [2, 3, 4, 6]
