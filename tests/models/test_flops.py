"""Analytic counts against the model itself and against torch's FLOP counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from kinodit.models.flops import count_parameters, forward_flops
from kinodit.models.mmdit import MMDiT
from kinodit.models.presets import PRESETS
from tests.models.packs import filler, pack
from tests.models.test_mmdit import CHANNELS, CONDITIONS, VARIANTS, build, causal, samples


def flash_flops(
    q: list[int], k: list[int], v: list[int], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """FLOPs of CPU flash attention, which torch's counter does not know; H_kv may be below H."""
    count: int = sdpa_flop_count(q, (*k[:1], q[1], *k[2:]), (*v[:1], q[1], *v[2:]))
    return count


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash_flops}


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_equal_the_models(variant: str) -> None:
    with torch.device("meta"):
        model = MMDiT(VARIANTS[variant])
    assert count_parameters(VARIANTS[variant]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_presets_equal_the_models(preset: str) -> None:
    with torch.device("meta"):
        model = MMDiT(PRESETS[preset])
    assert count_parameters(PRESETS[preset]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("per_frame", [False, True], ids=["per_segment", "per_frame"])
def test_flops_equal_torchs_counter(variant: str, per_frame: bool) -> None:
    config = VARIANTS[variant]
    model = build(config)
    batch = pack(samples(per_frame), causal if per_frame else lambda query, key: True)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        model(batch)
    lengths = torch.bincount(batch.modalities["text"].segment)
    found = forward_flops(
        config,
        {name: tokens.num_tokens for name, tokens in batch.modalities.items()},
        num_pairs=batch.layout.num_pairs,
        num_segments=batch.num_segments,
        num_levels=batch.level_t.numel(),
        pairs_within={"text": int((lengths**2).sum())},
    )
    assert found == counter.get_total_flops()


def test_a_filler_pack_costs_nothing() -> None:
    batch = filler(CHANNELS, CONDITIONS)
    tokens = dict.fromkeys(batch.modalities, 0)
    assert forward_flops(VARIANTS["refiner"], tokens, 0, 0, 0) == 0
