"""Samples by tasks: what is given stays, plain settings take the plain path, passes are counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from kinodit.data.encode import SampleEncoder
from kinodit.data.packing import EncodedSample, PackSpec, StreamSpec, pack, unpatchify
from kinodit.data.tasks import DrawnTask, StreamTask, TaskConfig
from kinodit.models.diffusion.field import velocity_field
from kinodit.models.diffusion.guidance import GuidanceConfig, guided
from kinodit.models.diffusion.objective import RectifiedFlowConfig, build_objective
from kinodit.models.diffusion.samplers import Method, SamplerConfig, sample, time_grid
from kinodit.models.diffusion.windows import WindowConfig
from kinodit.models.mmdit import MMDiT
from kinodit.models.random import generator, normal
from kinodit.models.tokens import SampleKey, TokenBatch
from kinodit.trainer.drawing import Drawing, GivenMediaError, Order
from tests.support.tasks import TASKS, av_model

SPEC = PackSpec(
    (StreamSpec("text", 5), StreamSpec("video", 6, (1, 1, 1)), StreamSpec("audio", 3, (1, 1, 1))),
    {"text_pooled": 4},
)
OBJECTIVE = build_objective(RectifiedFlowConfig(prediction="velocity"))
SECONDS = {"video": 0.25, "audio": 0.125}
GRIDS = {"video": (4, 2, 3), "audio": (8, 1, 1)}
SCALE_1 = GuidanceConfig(scale=1.0)


class Words:
    """A caption's features: as many tokens as it has letters, at least one."""

    def __init__(self) -> None:
        self.prepared: list[str] = []

    def prepare(self, captions: Sequence[str]) -> None:
        self.prepared = ["", *captions]

    def text(self, caption: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert caption in self.prepared, "ranks that hold an encoder together were not told"
        source = generator("words", caption)
        tokens = normal(source, (max(1, len(caption)), 5)).double()
        return {"text": tokens}, {"text_pooled": normal(source, (4,)).double()}


class Counting:
    """The network, with the streams' tokens of each of its passes."""

    def __init__(self, model: MMDiT) -> None:
        self.model = model
        self.passes: list[dict[str, int]] = []

    def __call__(self, batch: TokenBatch) -> Mapping[str, Tensor]:
        self.passes.append({n: t.num_tokens for n, t in batch.modalities.items()})
        doubled = batch.in_dtype(torch.float64)
        found: Mapping[str, Tensor] = self.model(doubled)
        return found


@pytest.fixture
def network() -> Counting:
    return Counting(av_model())


def drawing(network: Counting, **changes: Any) -> Drawing:
    plain: dict[str, Any] = {
        "sampler": SamplerConfig(steps=2),
        "guidance": SCALE_1,
        "window": WindowConfig(),
        "shift": 2.0,
    }
    encoder = cast(SampleEncoder, Words())
    device = torch.device("cpu")
    return Drawing(
        network,
        network.model,
        OBJECTIVE,
        encoder,
        SPEC,
        device,
        torch.float64,
        **{**plain, **changes},
    )


def order(task: TaskConfig | None = None, **changes: Any) -> Order:
    given = {
        name: normal(generator("given", name), (channels, *GRIDS[name])).double()
        for name, channels in (("video", 6), ("audio", 3))
    }
    drawn = None if task is None else DrawnTask("task", task, 0)
    return replace(Order("a cat", 1, GRIDS, SECONDS, drawn, given), **changes)


@torch.no_grad()
def drawn(network: Counting, wish: Order, **changes: Any) -> dict[str, Tensor]:
    return drawing(network, **changes)(wish)


def packed(prompt: str) -> TokenBatch:
    """A clip to be drawn from a prompt."""
    words = Words()
    words.prepare([prompt])
    text, conditions = words.text(prompt)
    latents = {"video": torch.zeros(6, 4, 2, 3), "audio": torch.zeros(3, 8, 1, 1)}
    key = SampleKey(0, 1, "prompt")
    return pack([EncodedSample(key, latents, SECONDS, text, conditions)], SPEC)


def start_of(prompt: str) -> dict[str, Tensor]:
    """The noise that it starts from."""
    return {
        name: normal(generator(0, "sample", 1, prompt, name), shape).double()
        for name, shape in (("video", (24, 6)), ("audio", (8, 3)))
    }


@torch.no_grad()
@pytest.mark.parametrize("method", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_without_a_task_it_is_the_plain_sampler_to_the_bit(
    network: Counting, method: Method, scale: float
) -> None:
    start = start_of("a cat")
    batches = packed("a cat"), packed("")
    c, u = (velocity_field(network, OBJECTIVE, batch) for batch in batches)
    guidance = GuidanceConfig(scale=scale)
    expected = sample(guided(c, u, guidance, batches[0]), start, time_grid(2, 2.0), method)
    num_passes = len(network.passes)
    found = drawn(network, order(), sampler=SamplerConfig(method, 2), guidance=guidance)
    assert len(network.passes) == 2 * num_passes
    assert torch.equal(found["video"], unpatchify(expected["video"], GRIDS["video"], (1, 1, 1)))
    assert torch.equal(found["audio"], unpatchify(expected["audio"], GRIDS["audio"], (1, 1, 1)))
    everything = drawn(
        network, order(TaskConfig()), sampler=SamplerConfig(method, 2), guidance=guidance
    )
    for name, latents in found.items():
        assert torch.equal(everything[name], latents)


@torch.no_grad()
def test_a_negative_prompt_stands_where_the_empty_caption_stood(network: Counting) -> None:
    guidance = GuidanceConfig(scale=2.0, scales={"audio": 3.0})
    batches = packed("a cat"), packed("a blurred dog")
    c, u = (velocity_field(network, OBJECTIVE, batch) for batch in batches)
    velocity = guided(c, u, guidance, batches[0])
    expected = sample(velocity, start_of("a cat"), time_grid(2, 2.0), "euler")
    found = drawn(network, order(), guidance=guidance, negative="a blurred dog")
    assert torch.equal(found["video"], unpatchify(expected["video"], GRIDS["video"], (1, 1, 1)))
    assert torch.equal(found["audio"], unpatchify(expected["audio"], GRIDS["audio"], (1, 1, 1)))
    plain = drawn(network, order(), guidance=guidance)
    empty = drawn(network, order(), guidance=guidance, negative="")
    for name, latents in plain.items():
        assert torch.equal(empty[name], latents)
        assert not torch.equal(found[name], latents)


@torch.no_grad()
def test_guided_away_from_the_prompt_itself_nothing_is_guided(network: Counting) -> None:
    guidance = GuidanceConfig(scale=3.0)
    for task in (None, TASKS["blocks"], TASKS["image to video"]):
        plain = drawn(network, order(task))
        same = drawn(network, order(task), guidance=guidance, negative="a cat")
        assert all(torch.equal(same[name], latents) for name, latents in plain.items())


def test_a_negative_prompt_is_of_the_text_alone(network: Counting) -> None:
    """Neither a pass without another condition nor one without text at all has it."""
    guidance = GuidanceConfig(scale=1.0, conditions={"audio": 2.0})
    for wish in (order(), order(TASKS["unconditional"])):
        plain = drawn(network, wish, guidance=guidance)
        found = drawn(network, wish, guidance=guidance, negative="a blurred dog")
        assert all(torch.equal(found[name], latents) for name, latents in plain.items())


@pytest.mark.parametrize("name", TASKS)
def test_what_is_given_stays_and_the_rest_is_drawn(network: Counting, name: str) -> None:
    task, wish = TASKS[name], order(TASKS[name])
    found = drawn(network, wish)
    for stream, given in wish.given.items():
        settings = task.stream(stream, False)
        if settings.use in ("absent", "noise"):
            assert stream not in found
            continue
        same = (found[stream] == given).all(0)
        if settings.use == "clean":
            assert bool(same.all())
        elif settings.given == "none":
            assert not bool(same.any())
        else:
            assert 0 < int(same.sum()) < same.numel()
            if settings.given in ("prefix", "suffix"):
                per_frame = same.flatten(1).all(1).tolist()
                kept = sum(per_frame)
                assert per_frame == sorted(per_frame, reverse=settings.given == "prefix")
                assert kept >= 1
    assert all(bool(x.isfinite().all()) for x in found.values())


def test_each_condition_with_a_scale_has_a_pass_without_it(network: Counting) -> None:
    def passes(task: TaskConfig | None, **settings: Any) -> list[dict[str, int]]:
        network.passes.clear()
        drawn(
            network,
            order(task),
            sampler=SamplerConfig(steps=1),
            guidance=GuidanceConfig(**settings),
        )
        return network.passes

    everything = {"text": 5, "video": 24, "audio": 8}
    assert passes(None, scale=1.0) == [everything]
    assert passes(None, scale=2.0) == [everything, {**everything, "text": 1}]
    assert passes(None, scale=1.0, conditions={"audio": 2.0, "video": 1.0}) == [
        everything,
        {**everything, "audio": 0},
    ]
    both = passes(None, scale=1.0, conditions={"audio": 2.0, "video": 3.0}, without="noise")
    assert both == [everything] * 3
    v2a = TASKS["video to audio"]
    assert passes(v2a, scale=2.0, conditions={"video": 2.0}) == [
        everything,
        {**everything, "text": 1},
        {**everything, "video": 0},
    ]
    unconditional = TASKS["unconditional"]
    assert passes(unconditional, scale=2.0) == [{**everything, "text": 1}]


def test_without_a_stream_is_its_marginal_and_noise_hides_it(network: Counting) -> None:
    """With w = 0 the guided velocity is that without the condition: what is given says nothing."""
    v2a = TASKS["video to audio"]
    for without in ("absent", "noise"):
        guidance = GuidanceConfig(scale=1.0, conditions={"video": 0.0}, without=without)
        one = drawn(network, order(v2a), guidance=guidance)["audio"]
        other = order(v2a)
        other = replace(other, given={**other.given, "video": torch.zeros(6, 4, 2, 3)})
        assert torch.equal(drawn(network, other, guidance=guidance)["audio"], one)
        assert not torch.equal(drawn(network, other)["audio"], drawn(network, order(v2a))["audio"])


def test_one_window_is_the_plain_sampler_to_the_bit(network: Counting) -> None:
    plain = drawn(network, order())
    long_enough = drawn(network, order(), window=WindowConfig(1.0, 0.5))
    assert all(torch.equal(long_enough[name], plain[name]) for name in plain)
    cut = drawn(network, order(), window=WindowConfig(0.5, 0.25))
    assert not torch.equal(cut["video"], plain["video"])


def test_windows_have_prompts_of_their_time(network: Counting) -> None:
    network.passes.clear()
    wish = order(prompt="cat | horse")
    found = drawn(network, wish, sampler=SamplerConfig(steps=1), window=WindowConfig(0.5, 0.25))
    # Three windows of two frames and their sound; the middle one's middle is the second prompt's.
    assert network.passes == [{"text": n, "video": 12, "audio": 4} for n in (3, 5, 5)]
    alone = drawn(
        network,
        order(prompt="cat | dove!"),
        sampler=SamplerConfig(steps=1),
        window=WindowConfig(0.5, 0.25),
    )
    same = [bool((found["video"] == alone["video"])[:, frame].all()) for frame in range(4)]
    assert not any(same)  # the noise is keyed by the whole prompt
    assert found["video"].shape == (6, 4, 2, 3)


def test_windows_see_what_is_given_of_them(network: Counting) -> None:
    v2a = TASKS["video to audio"]
    window = WindowConfig(0.5, 0.0)
    before = drawn(network, order(v2a), window=window)["audio"]
    changed = order(v2a)
    video = changed.given["video"].clone()
    video[:, 2:] += 1.0
    after = drawn(network, replace(changed, given={"video": video}), window=window)["audio"]
    assert torch.equal(before[:, :4], after[:, :4])
    assert not (before[:, 4:] == after[:, 4:]).any()


def test_an_idle_rank_makes_as_many_passes(network: Counting) -> None:
    for name in ("blocks", "image to video", ""):
        counts = []
        for prompt in ("a cat", None):
            network.passes.clear()
            wish = order(TASKS[name] if name else None, prompt=prompt)
            found = drawn(network, wish, guidance=GuidanceConfig(scale=2.0))
            assert bool(found) == (prompt is not None)
            counts.append(len(network.passes))
        assert counts[0] == counts[1] > 0


def test_what_a_task_lacks_is_named(network: Counting) -> None:
    v2a = TASKS["video to audio"]
    with pytest.raises(GivenMediaError, match="'task' is given video, but there is none"):
        drawn(network, order(v2a, given={}))
    short = {"video": torch.zeros(6, 2, 2, 3)}
    with pytest.raises(GivenMediaError, match="has 2 x 2 x 3 latent frames"):
        drawn(network, order(v2a, given=short))
    with pytest.raises(GivenMediaError, match="blocks reach any length"):
        drawn(network, order(TASKS["blocks"]), window=WindowConfig(0.5))


def test_blocks_reach_any_length(network: Counting) -> None:
    grids = {"video": (9, 2, 3), "audio": (18, 1, 1)}
    task = replace(TASKS["blocks, the last seen"], streams={"audio": StreamTask(use="absent")})
    found = drawn(network, order(task, grids=grids, given={}))
    assert found["video"].shape == (6, 9, 2, 3)
    assert len(found["video"].flatten(2).permute(1, 0, 2).unique(dim=0)) == 9


def test_what_is_given_is_told_in_latent_cells(network: Counting) -> None:
    draw = drawing(network)
    cells = draw.given_cells(order(TASKS["image to video"]))
    assert set(cells) == {"video"} and cells["video"].shape == GRIDS["video"]
    assert cells["video"][0].all() and not cells["video"][1:].any()
    hole = TaskConfig(streams={"video": StreamTask(given="outside")})
    wish = order(hole)
    cells = draw.given_cells(wish)
    # It is the hole that is drawn: what is given stays as it was, and nothing else does.
    found = drawn(network, wish)
    stays = (found["video"] == wish.given["video"]).all(dim=0)
    assert torch.equal(stays, cells["video"]) and stays.any() and not stays.all()
    assert not cells["audio"].any(), "nothing of it is given, all is drawn"
    assert draw.given_cells(replace(order(hole), task=None)) == {}
    assert draw.given_cells(order(TaskConfig(block_s=0.25))) == {}
    assert draw.given_cells(replace(order(hole), prompt=None)) == {}


PICTURES = [normal(generator("picture", n), (6, 1, 1 + n, 2)).double() for n in range(2)]
EDIT = TaskConfig(
    streams={"video": StreamTask(references="clean"), "audio": StreamTask(use="absent")}
)
GROUP = TaskConfig(
    streams={"video": StreamTask(references="target"), "audio": StreamTask(use="absent")}
)
PICTURE = {"video": (1, 2, 3)}


def after(task: TaskConfig | None, **changes: Any) -> Order:
    """A picture after two others."""
    wish = order(task, grids=PICTURE, given={}, references={"video": PICTURES})
    return replace(wish, **changes)


def test_what_is_drawn_depends_on_its_reference_pictures(network: Counting) -> None:
    found = drawn(network, after(EDIT))
    assert network.passes[0] == {"text": 5, "video": 2 + 4 + 6, "audio": 0}
    assert list(found) == ["video"] and found["video"].shape == (6, 1, 2, 3)
    turned = drawn(network, after(EDIT, references={"video": PICTURES[::-1]}))
    assert not torch.equal(turned["video"], found["video"])


def test_a_group_is_drawn_together(network: Counting) -> None:
    found = drawn(network, after(GROUP))
    shapes = {name: tuple(latents.shape) for name, latents in found.items()}
    expected = {"video/0": (6, 1, 1, 2), "video/1": (6, 1, 2, 2), "video": (6, 1, 2, 3)}
    assert shapes == expected
    zeros = after(GROUP, references={"video": [torch.zeros_like(p) for p in PICTURES]})
    again = drawn(network, zeros)
    assert all(torch.equal(again[name], latents) for name, latents in found.items())


def test_guidance_by_reference_pictures_compares_with_none(network: Counting) -> None:
    """With w = 0 they say nothing, with w = 1 there is no pass without them."""
    guidance = GuidanceConfig(scale=1.0, conditions={"references": 0.0})
    one = drawn(network, after(EDIT), guidance=guidance)["video"]
    assert [p["video"] for p in network.passes[:2]] == [12, 6]
    other = after(EDIT, references={"video": [2 * picture for picture in PICTURES]})
    assert torch.equal(drawn(network, other, guidance=guidance)["video"], one)
    assert not torch.equal(drawn(network, after(EDIT))["video"], one)
    network.passes.clear()
    both = GuidanceConfig(scale=2.0, conditions={"references": 3.0}, rescale=0.5)
    drawn(network, after(EDIT), guidance=both, sampler=SamplerConfig(steps=1))
    assert [(p["text"], p["video"]) for p in network.passes] == [(5, 12), (1, 12), (5, 6)]


def test_reference_pictures_that_do_not_fit_are_named(network: Counting) -> None:
    with pytest.raises(GivenMediaError, match="given reference pictures, but there are none"):
        drawn(network, after(EDIT, references={}))
    for task in (None, TASKS["image to video"]):
        with pytest.raises(GivenMediaError, match="there are reference pictures, but the task"):
            drawn(network, after(task))
    long = after(EDIT, grids={"video": (4, 2, 3)})
    with pytest.raises(GivenMediaError, match="before the first window alone"):
        drawn(network, long, window=WindowConfig(0.5))
    with pytest.raises(GivenMediaError, match="names 'smell'; conditions with a scale there are"):
        drawn(network, order(), guidance=GuidanceConfig(conditions={"smell": 2.0}))
