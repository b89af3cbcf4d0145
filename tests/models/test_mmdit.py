"""The model as a whole: packing changes nothing, absent streams run, configs are checked."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kinodit.models.errors import ConfigError
from kinodit.models.init import initialize
from kinodit.models.mmdit import ConditionConfig, MMDiT, MMDiTConfig, StreamConfig
from kinodit.models.moe.config import ExpertsConfig, RouterConfig
from kinodit.models.rope import RopeConfig
from kinodit.models.tokens import AttentionLayout
from tests.models.packs import Sample, filler, pack, random_sample, randomize

CHANNELS = {"video": 6, "text": 5}
CONDITIONS = {"pooled": 7, "guidance": 1}
BASE = MMDiTConfig(
    streams={
        "video": StreamConfig(6),
        "text": StreamConfig(5, output=False, position="none"),
    },
    conditions={"pooled": ConditionConfig(7), "guidance": ConditionConfig(1, "scalar")},
    width=48,
    num_heads=4,
    num_double_blocks=2,
)
SINGLE = dataclasses.replace(BASE, num_single_blocks=2)
VARIANTS = {
    "double": BASE,
    "single": SINGLE,
    "gqa_swiglu": dataclasses.replace(
        SINGLE, num_kv_heads=2, activation="swiglu", bias=False, qkv_bias=False
    ),
    "experts": dataclasses.replace(
        SINGLE,
        experts={
            "video": ExpertsConfig(4, 2, 1.0, 0.5),
            "text": ExpertsConfig(3, 1, 1.0, blocks=(1,), router=RouterConfig(scores="sigmoid")),
            "all": ExpertsConfig(2, 1, 1.0, router=RouterConfig("modality"), blocks=(1,)),
        },
    ),
    "experts_by_noise": dataclasses.replace(
        BASE,
        condition_width=40,
        experts={
            "video": ExpertsConfig(4, 2, 1.0, router=RouterConfig("timestep")),
            "text": ExpertsConfig(3, 1, 1.0, router=RouterConfig("noise_level")),
        },
    ),
    "no_qk_norm_sincos": dataclasses.replace(
        BASE,
        qk_norm="none",
        streams={
            "video": StreamConfig(6, position="sincos_2d"),
            "text": StreamConfig(5, output=False, position="none"),
        },
    ),
    "widths": dataclasses.replace(
        BASE,
        streams={
            "video": StreamConfig(6),
            "text": StreamConfig(5, width=24, position="none"),
        },
    ),
    "refiner": dataclasses.replace(
        BASE,
        streams={
            "video": StreamConfig(6),
            "text": StreamConfig(5, output=False, position="none", refiner_blocks=2),
        },
    ),
    "next_dit": dataclasses.replace(
        SINGLE,
        modulation="scale_gate",
        block_norm="rms",
        sandwich_norm=True,
        condition_width=20,
        norm_eps=1e-5,
    ),
    "adaln_lora": dataclasses.replace(SINGLE, modulation_rank=3),
    "time_aware": dataclasses.replace(
        SINGLE, rope=RopeConfig(scaling="time_aware", factors=(2.0, 1.5, 1.0))
    ),
}
GRIDS = (
    {"video": (2, 3, 2), "text": (1, 1, 4)},
    {"video": (1, 4, 4), "text": (1, 1, 3)},
    {"video": (3, 2, 2), "text": (1, 1, 0)},
    {"video": (1, 4, 4), "text": (1, 1, 3)},
)


def build(config: MMDiTConfig, dtype: torch.dtype = torch.float64) -> MMDiT:
    model = MMDiT(config).to(dtype)
    randomize(model)
    return model


def samples(per_frame: bool = False) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    return [
        random_sample(generator, grid, CHANNELS, CONDITIONS, per_frame=per_frame) for grid in GRIDS
    ]


def gradients(model: MMDiT) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.clone()
    model.zero_grad()
    return found


def causal(query: int, key: int) -> bool:
    return key <= query


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("per_frame", [False, True], ids=["per_segment", "per_frame"])
def test_a_pack_equals_its_samples_one_by_one(variant: str, per_frame: bool) -> None:
    model = build(VARIANTS[variant])
    all_samples = samples(per_frame)
    visible = causal if per_frame else lambda query, key: True
    packed = model(pack(all_samples, visible))
    alone = [model(pack([sample], visible)) for sample in all_samples]
    for name in packed:
        expected = torch.cat([output[name] for output in alone])
        torch.testing.assert_close(packed[name], expected, atol=1e-12, rtol=1e-12)
        assert expected.std() > 1e-3
    sum(output.square().sum() for output in packed.values()).backward()
    from_packed = gradients(model)
    for output in alone:
        sum(part.square().sum() for part in output.values()).backward()
    for name, expected in gradients(model).items():
        # The floor is for biases of keys, whose true gradient is 0.
        scale = expected.abs().max().clamp_min(1).item()
        torch.testing.assert_close(from_packed[name], expected, atol=1e-12 * scale, rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_tokens_at_all_reach_every_parameter(variant: str) -> None:
    model = build(VARIANTS[variant], torch.float32)
    outputs = model(filler(CHANNELS, CONDITIONS))
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {
        name: (0, CHANNELS[name]) for name in outputs
    }
    sum(output.sum() for output in outputs.values()).backward()
    for name, gradient in gradients(model).items():
        assert torch.count_nonzero(gradient) == 0, name


def test_an_absent_stream_still_runs() -> None:
    model = build(BASE)
    generator = torch.Generator().manual_seed(2)
    grid = {"video": (2, 2, 2), "text": (1, 1, 0)}
    batch = pack([random_sample(generator, grid, CHANNELS, CONDITIONS)])
    model(batch)["video"].sum().backward()
    gradients(model)


@pytest.mark.parametrize("variant", ["single", "next_dit", "adaln_lora"])
def test_the_first_prediction_is_zero_and_blocks_are_the_identity(variant: str) -> None:
    model = MMDiT(VARIANTS[variant]).double()
    initialize(model, seed=3)
    batch = pack(samples())
    for output in model(batch).values():
        assert torch.count_nonzero(output) == 0
    seen = []
    for block in (*model.joint_blocks, *model.single_blocks):
        block.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    model(batch)
    for before, after in seen[:2]:
        for name in before:
            assert torch.equal(before[name], after[name])
    for before, after in seen[2:]:
        assert torch.equal(before, after)


def test_attention_is_one_settable_op() -> None:
    model = build(SINGLE)
    calls = []
    original = model.attend

    def counted(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout) -> Tensor:
        calls.append(tuple(q.shape))
        return original(q, k, v, layout)

    batch = pack(samples())
    expected = model(batch)["video"]
    model.attend = counted
    assert torch.equal(model(batch)["video"], expected)
    assert calls == [(batch.num_tokens, 4, 12)] * 4


def test_initial_weights_depend_on_the_name_alone() -> None:
    first, second = MMDiT(SINGLE), MMDiT(SINGLE).double()
    initialize(first, seed=5)
    initialize(second, seed=5)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one.double(), two), name
    other = MMDiT(SINGLE)
    initialize(other, seed=6)
    values, others = dict(first.named_parameters()), dict(other.named_parameters())
    assert not torch.equal(
        others["embeds.video.linear.weight"], values["embeds.video.linear.weight"]
    )
    assert values["joint_blocks.0.streams.text.modulation.linear.weight"].abs().max() == 0
    alike = "joint_blocks.0.streams.{}.attention.q.weight"
    video, text = (values[alike.format(stream)] for stream in ("video", "text"))
    assert video.shape == text.shape
    assert not torch.equal(video, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "48 does not divide into model.num_heads = 5"),
        ({"num_kv_heads": 3}, "not a multiple of model.num_kv_heads = 3"),
        (
            {"streams": {"a": StreamConfig(4), "b": StreamConfig(4, width=24)}},
            r"streams of one width, found widths \[24, 48\]",
        ),
        ({"rope": RopeConfig(axes=(4, 4, 2))}, "add up to 10, but the head dim is 12"),
        ({"head_dim": 7}, "the head dim 7 is odd"),
        ({"num_double_blocks": 0, "num_single_blocks": 0}, "at least one block"),
        (
            {"width": 42, "num_heads": 2, "streams": {"a": StreamConfig(4, position="sincos_2d")}},
            "sincos_2d needs a multiple of 4",
        ),
    ],
)
def test_contradictions_are_config_errors(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SINGLE, **change)  # type: ignore[arg-type]


def test_a_model_without_output_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="at least one stream with output = true"):
        MMDiT(MMDiTConfig(streams={"text": StreamConfig(4, output=False)}))


@pytest.mark.parametrize("variant", ["single", "refiner", "next_dit"])
def test_every_variant_starts_from_a_rule(variant: str) -> None:
    model = MMDiT(VARIANTS[variant])
    initialize(model, seed=0)
    for name, parameter in model.named_parameters():
        is_live = parameter.abs().max() > 0
        starts_at_zero = name.endswith("bias") or "modulation" in name or "heads." in name
        assert is_live != starts_at_zero, name


@pytest.mark.parametrize("per_frame", [False, True], ids=["per_segment", "per_frame"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_stays_near_float32(autocast: bool, per_frame: bool) -> None:
    batch = pack(samples(per_frame))
    exact, rounded = build(SINGLE, torch.float32), build(SINGLE, torch.float32)
    if not autocast:
        rounded.to(torch.bfloat16)
    expected = exact(batch)["video"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = rounded(batch)["video"]
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.03 * expected.norm()
    expected.square().mean().backward()
    found.float().square().mean().backward()
    wanted, got = gradients(exact), gradients(rounded)
    for name, gradient in wanted.items():
        error = (got[name].float() - gradient).norm()
        assert error < 0.1 * gradient.norm() + 1e-4, name
