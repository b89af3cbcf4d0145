"""The forward on pretended CUDA tensors: mixed devices and anything that needs a value raise."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kinodit.launch.accept.pretended import Ops, on_cuda, pretend
from kinodit.models.config import MMDiTConfig
from kinodit.models.mmdit import MMDiT
from kinodit.models.presets import PRESETS
from kinodit.models.tokens import TokenBatch
from tests.models.packs import pack, random_sample
from tests.models.test_mmdit import VARIANTS, causal, samples
from tests.support.quick import quick

DTYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("variant", "dtype", "per_frame"),
    quick(
        itertools.product(["refiner", "next_dit", "gqa_swiglu"], DTYPES, [False, True]),
        *(("refiner", torch.bfloat16, is_causal) for is_causal in (False, True)),
        *(("gqa_swiglu", dtype, True) for dtype in DTYPES),
        ("next_dit", torch.bfloat16, False),
    ),
)
def test_the_forward_never_waits_for_the_device(
    variant: str, dtype: torch.dtype, per_frame: bool
) -> None:
    config = VARIANTS[variant]
    batch = pack(samples(per_frame), causal if per_frame else lambda query, key: True)
    with torch.device("meta"):
        model = MMDiT(dataclasses.replace(config, head_dim=16, width=64)).to(dtype)
    with FakeTensorMode(), torch.no_grad():
        weights = {name: pretend(x) for name, x in model.named_parameters()}
        moved = on_cuda(batch)
        with Ops() as ops:
            outputs = torch.func.functional_call(model, weights, (moved,))
    for name, output in outputs.items():
        assert output.device.type == "cuda"
        assert output.dtype == dtype
        assert output.shape == batch.modalities[name].latents.shape
    is_varlen = dtype == torch.bfloat16 and (not per_frame or variant == "refiner")
    assert any("varlen" in name for name in ops.counts) == is_varlen


def two_clips(config: MMDiTConfig, dtype: torch.dtype) -> TokenBatch:
    """A five-second clip of 480p and an image, as packed latents of a causal autoencoder."""
    generator = torch.Generator().manual_seed(0)
    clips = [
        random_sample(
            generator,
            {name: grid if name == "video" else (1, 1, num_words) for name in config.streams},
            {name: stream.in_channels for name, stream in config.streams.items()},
            {name: condition.dim for name, condition in config.conditions.items()},
            dtype=dtype,
        )
        for grid, num_words in (((21, 30, 52), 226), ((1, 64, 64), 77))
    ]
    return pack(clips)


WIDE = quick(
    itertools.product(["2b", "8b", "14b", "30b"], DTYPES),
    *(("2b", dtype) for dtype in DTYPES),
    ("30b", torch.bfloat16),
)


def one_of_each_block(preset: str) -> MMDiTConfig:
    whole = PRESETS[preset]
    return dataclasses.replace(
        whole, num_double_blocks=1, num_single_blocks=min(1, whole.num_single_blocks)
    )


@pytest.mark.parametrize(("preset", "dtype"), WIDE)
def test_blocks_of_full_width_run_on_the_device_alone(preset: str, dtype: torch.dtype) -> None:
    config = one_of_each_block(preset)
    batch = two_clips(config, dtype)
    with torch.device("meta"):
        model = MMDiT(config).to(dtype)
    with FakeTensorMode(), torch.no_grad():
        weights = {name: pretend(x) for name, x in model.named_parameters()}
        with Ops() as ops:
            outputs = torch.func.functional_call(model, weights, (on_cuda(batch),))
    assert outputs["video"].device.type == "cuda"
    assert outputs["video"].shape == batch.modalities["video"].latents.shape
    assert any("varlen" in name for name in ops.counts) == (dtype == torch.bfloat16)


@pytest.mark.parametrize(("preset", "dtype"), WIDE)
def test_blocks_of_full_width_give_every_weight_a_gradient(preset: str, dtype: torch.dtype) -> None:
    """On pretended CPU tensors: autograd itself has no CUDA on a machine without it."""
    config = one_of_each_block(preset)
    batch = two_clips(config, dtype)
    with torch.device("meta"):
        model = MMDiT(config).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {
            name: torch.empty(x.shape, dtype=dtype, requires_grad=True)
            for name, x in model.named_parameters()
        }
        outputs = torch.func.functional_call(model, weights, (batch,))
        outputs["video"].float().square().mean().backward()
    for name, weight in weights.items():
        assert weight.grad is not None, name
        assert weight.grad.shape == weight.shape and weight.grad.dtype == dtype, name
