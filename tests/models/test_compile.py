"""Compiled blocks give what eager ones give, for packs of any layout."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from tests.models.packs import pack
from tests.models.test_mmdit import SINGLE, build, causal, gradients, samples


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the compiler itself warns of
def test_compiled_blocks_equal_eager_ones() -> None:
    torch.compiler.reset()
    eager = build(dataclasses.replace(SINGLE, num_double_blocks=1, num_single_blocks=1))
    compiled = copy.deepcopy(eager)
    for block in (*compiled.joint_blocks, *compiled.single_blocks):
        block.compile()
    for batch in (pack(samples()[:1]), pack(samples(per_frame=True), causal)):
        expected, found = eager(batch)["video"], compiled(batch)["video"]
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
        expected.square().sum().backward()
        found.square().sum().backward()
        wanted, got = gradients(eager), gradients(compiled)
        for name, gradient in wanted.items():
            scale = gradient.abs().max().clamp_min(1).item()
            torch.testing.assert_close(got[name], gradient, atol=1e-11 * scale, rtol=1e-11)
    torch.compiler.reset()
