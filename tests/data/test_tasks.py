"""Tasks: declared, drawn by weight, and turned into roles, levels and groups of tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kinodit.data.packing import EncodedSample, PackSpec, StreamSpec, concatenate, pack, split
from kinodit.data.synthetic import task_pack
from kinodit.data.tasks import (
    DrawnTask,
    RegionConfig,
    StreamTask,
    TaskConfig,
    TaskError,
    TaskMix,
    check_tasks,
    draw_task,
)
from kinodit.models.errors import ConfigError
from kinodit.models.random import generator, normal
from kinodit.models.tokens import ModalityTokens, Role, SampleKey, TokenBatch
from tests.data.test_packing import assert_equal
from tests.support.tasks import CONDITIONS, STREAMS, TASKS

SLOTS = [0, 1, 3, 4, 5, 6, 7, 9]
SPEC = PackSpec(
    (StreamSpec("text", 5), StreamSpec("video", 3, (1, 2, 2)), StreamSpec("audio", 2, (1, 1, 1)))
)


def sample(task: TaskConfig | None, number: int = 1, frames: int = 4) -> EncodedSample:
    source = generator("tasks", number)
    return EncodedSample(
        key=SampleKey(2, number, f"clips:{number}"),
        latents={
            "video": normal(source, (3, frames, 4, 6)),
            "audio": normal(source, (2, 2 * frames, 1, 1)),
        },
        seconds={"video": 0.5, "audio": 0.25},
        text={"text": normal(source, (3, 5))},
        conditions={},
        task=None if task is None else DrawnTask("task", task, 0),
    )


def packed(task: TaskConfig, number: int = 1, frames: int = 4) -> TokenBatch:
    return pack([sample(task, number, frames)], SPEC)


def frames_of(tokens: ModalityTokens, role: Role, frame_s: float = 0.5) -> list[int]:
    """Frames of the tokens that have a role, each once."""
    times = tokens.position[tokens.role == int(role), 0] / frame_s
    return sorted(set(times.round().to(torch.int64).tolist()))


def all_packs(name: str) -> TokenBatch:
    return task_pack(0, SLOTS, STREAMS, CONDITIONS, torch.float32, {name: TASKS[name]}, 0)


@pytest.mark.tasks
@pytest.mark.parametrize("name", TASKS)
def test_every_sample_has_something_to_learn_and_only_that_has_a_loss(name: str) -> None:
    batch = all_packs(name)
    for segment in range(batch.num_segments):
        weights = [t.weight[t.segment == segment].sum() for t in batch.modalities.values()]
        assert sum(weights) > 0
    for tokens in batch.modalities.values():
        noised = tokens.role == int(Role.NOISED)
        assert torch.equal(tokens.weight, noised.float())
        assert torch.equal(batch.level_segment[tokens.level], tokens.segment)
        assert torch.equal(tokens.segment, tokens.segment.sort().values)
    assert not batch.modalities["text"].weight.any()


@pytest.mark.tasks
@pytest.mark.parametrize("name", TASKS)
def test_rows_of_clean_tokens_are_at_data_and_noise_is_at_noise(name: str) -> None:
    batch = all_packs(name)
    noised = torch.zeros(len(batch.level_t), dtype=torch.bool)
    for tokens in batch.modalities.values():
        noised[tokens.level[tokens.role == int(Role.NOISED)]] = True
    task = TASKS[name]
    for stream, tokens in batch.modalities.items():
        clean = tokens.role == int(Role.CLEAN)
        rows = tokens.level[clean]
        if stream == "text" and not (task.block_s or task.one_way or task.levels != "sample"):
            assert noised[rows].all()
            continue
        assert not noised[rows].any()
        is_noise = task.stream(stream, stream == "text").use == "noise"
        assert batch.level_t[rows].eq(float(is_noise)).all()


def test_a_task_that_generates_everything_is_as_no_task() -> None:
    plain, mixed = ([sample(task, i) for i in range(3)] for task in (None, TaskConfig()))
    assert_equal(pack(mixed, SPEC), pack(plain, SPEC))


@pytest.mark.parametrize(
    ("settings", "clean"),
    [
        ({"given": "prefix"}, [0]),
        ({"given": "suffix"}, [5]),
        ({"given": "ends"}, [0, 5]),
        ({"given": "prefix", "frames": (3, 3)}, [0, 1, 2]),
        ({"given": "prefix", "frames": (9, 9)}, [0, 1, 2, 3, 4]),
        ({"given": "ends", "frames": (9, 9)}, [0, 1, 4, 5]),
        ({"given": "every", "frames": (2, 2)}, [0, 2, 4]),
        ({"given": "at", "at": (0, 2, -1)}, [0, 2, 5]),
        ({"given": "prefix", "dropout": 1.0}, []),
    ],
)
def test_given_frames_are_clean(settings: dict[str, object], clean: list[int]) -> None:
    task = TaskConfig(streams={"video": StreamTask(**settings)})  # type: ignore[arg-type]
    video = packed(task, frames=6).modalities["video"]
    assert frames_of(video, Role.CLEAN) == clean
    assert frames_of(video, Role.NOISED) == [f for f in range(6) if f not in clean]


def test_one_frame_is_always_generated() -> None:
    for name, task in TASKS.items():
        if task.stream("video", False).given != "none":
            video = packed(task, frames=1).modalities["video"]
            assert video.weight.any(), name


def test_drawn_frames_and_boxes_differ_by_sample_and_are_pure() -> None:
    for given, distinct in (("random", 4), ("outside", 4)):
        task = TaskConfig(streams={"video": StreamTask(given=given, frames=(1, 3))})  # type: ignore[arg-type]
        roles = [tuple(packed(task, n).modalities["video"].role.tolist()) for n in range(20)]
        assert roles == [
            tuple(packed(task, n).modalities["video"].role.tolist()) for n in range(20)
        ]
        assert len(set(roles)) >= distinct


@pytest.mark.parametrize("number", range(6))
def test_a_box_is_at_the_same_place_in_every_frame(number: int) -> None:
    inside, outside = (
        packed(TaskConfig(streams={"video": StreamTask(given=given)}), number).modalities["video"]
        for given in ("inside", "outside")
    )
    assert torch.equal(inside.role, 1 - outside.role)
    by_frame = inside.role.view(4, -1)
    assert (by_frame == by_frame[0]).all()
    assert 0 < int((by_frame[0] == int(Role.CLEAN)).sum()) < 6


def test_a_named_box() -> None:
    task = TaskConfig(streams={"video": StreamTask(given="outside", box=(0.5, 0.0, 0.5, 0.67))})
    role = packed(task).modalities["video"].role.view(4, 2, 3)
    assert role[0].tolist() == [[0, 0, 0], [1, 1, 0]]


def test_a_region_says_what_a_task_leaves_open() -> None:
    def one(region: RegionConfig, **settings: Any) -> StreamTask:
        task = TaskConfig(
            streams={"video": StreamTask(**settings), "audio": StreamTask(use="clean")}
        )
        found = region.of(task)
        assert found.streams["audio"] == task.streams["audio"]
        return found.streams["video"]

    box, three, ends = (0.0, 0.5, 0.5, 0.5), RegionConfig(frames=3), RegionConfig(at=(0, -1))
    assert one(RegionConfig(box=box), given="outside") == StreamTask(given="outside", box=box)
    assert one(three, given="prefix") == StreamTask(given="prefix", frames=(3, 3))
    assert one(three, given="random", frames=(1, 2)) == StreamTask(given="random", frames=(3, 3))
    assert one(ends, given="prefix") == StreamTask(given="at", at=(0, -1))
    assert one(ends, given="at", at=(2,)) == StreamTask(given="at", at=(0, -1))
    assert one(RegionConfig(), given="every", frames=(2, 4)).frames == (2, 4)
    for region, settings, message in (
        (
            RegionConfig(box=box),
            {"given": "prefix"},
            r"box: \[.*\]: the task gives no",
        ),
        (three, {"given": "inside"}, "frames: 3: the task gives no part"),
        (ends, {}, r"at: \[0, -1\]: the task gives no part"),
        (RegionConfig(frames=1), {"given": "every", "frames": (2, 2)}, "must be the least and"),
        (RegionConfig(box=(0.5, 0.5, 0.6, 0.5)), {"given": "inside"}, "within it"),
    ):
        with pytest.raises(ConfigError, match=message):
            one(region, **settings)
    with pytest.raises(ConfigError, match="give how many frames, or which"):
        RegionConfig(frames=1, at=(0,))


def test_levels_of_streams_and_frames() -> None:
    def rows(task: TaskConfig) -> tuple[list[int], list[int]]:
        batch = packed(task)
        video, audio = (batch.modalities[name].level for name in ("video", "audio"))
        return video.unique().tolist(), audio.unique().tolist()

    assert rows(TaskConfig()) == ([0], [0])
    assert rows(TaskConfig(levels="stream")) == ([0], [1])
    assert rows(TaskConfig(levels="frame")) == ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11])
    assert rows(TaskConfig(block_s=1.0)) == ([0, 1, 2], [0, 1, 2])  # 2 is that of clean copies
    assert rows(TaskConfig(block_s=1.0, levels="stream")) == ([0, 1, 4], [2, 3, 4])


def test_blocks_are_there_twice_but_for_the_last() -> None:
    batch = packed(TaskConfig(block_s=1.0))
    video = batch.modalities["video"]
    assert frames_of(video, Role.CLEAN) == [0, 1]
    assert frames_of(video, Role.NOISED) == [0, 1, 2, 3]
    clean, noised = (video.role == int(role) for role in (Role.CLEAN, Role.NOISED))
    assert torch.equal(video.latents[clean], video.latents[noised][: int(clean.sum())])
    assert torch.equal(video.position[clean], video.position[noised][: int(clean.sum())])


def test_dropout_takes_a_clean_stream_away_by_itself() -> None:
    task = TaskConfig(streams={"audio": StreamTask(use="clean", dropout=0.5)})
    has_audio = [packed(task, n).modalities["audio"].num_tokens > 0 for n in range(60)]
    assert 15 < sum(has_audio) < 45
    other = replace(task, streams={"audio": StreamTask(use="clean", dropout=1.0)})
    assert not packed(other).modalities["audio"].num_tokens


def test_noise_is_keyed_and_says_nothing_of_the_sample() -> None:
    task = TaskConfig(streams={"audio": StreamTask(use="noise")})
    one, again = packed(task), packed(task)
    changed = sample(task)
    changed = replace(changed, latents={**changed.latents, "audio": torch.zeros(2, 8, 1, 1)})
    latents = one.modalities["audio"].latents
    assert torch.equal(latents, again.modalities["audio"].latents)
    assert torch.equal(latents, pack([changed], SPEC).modalities["audio"].latents)
    assert not one.modalities["audio"].weight.any()


PICTURES = [
    torch.full((3, 1, 2 * h, 2 * w), float(i)) for i, (h, w) in enumerate([(1, 2), (2, 2), (3, 1)])
]
"""Two reference pictures, and one that comes after them."""


def with_pictures(stream: StreamTask, **changes: Any) -> EncodedSample:
    task = TaskConfig(streams={"video": stream, "audio": StreamTask(use="absent")}, **changes)
    latents, references = {"video": PICTURES[-1]}, {"video": PICTURES[:-1]}
    return replace(sample(task), latents=latents, references=references)


def test_reference_pictures_of_any_sizes_come_clean_before_the_first_frame() -> None:
    batch = pack([with_pictures(StreamTask(references="clean"))], SPEC)
    video = batch.modalities["video"]
    assert video.num_tokens == 2 + 4 + 3
    assert video.latents[:, 0].tolist() == [0.0] * 2 + [1.0] * 4 + [2.0] * 3
    assert video.role.tolist() == [Role.CLEAN] * 6 + [Role.NOISED] * 3
    assert video.weight.tolist() == [0.0] * 6 + [1.0] * 3
    assert set(batch.level_t[video.level[:6]].tolist()) == {0.0}
    assert video.position[0].tolist() == [-1.0, 0.0, 0.0]
    assert video.position[2].tolist() == [-0.5, 0.0, 0.0]
    assert video.position[-1].tolist() == [0.0, 2.0, 0.0]


def test_a_group_is_generated_together() -> None:
    video = pack([with_pictures(StreamTask(references="target"))], SPEC).modalities["video"]
    assert video.num_tokens == 9 and (video.role == Role.NOISED).all() and video.weight.all()
    frames = pack([with_pictures(StreamTask(references="target"), levels="frame")], SPEC)
    assert len(frames.modalities["video"].level.unique()) == 3


def test_a_task_that_says_nothing_of_references_leaves_them_out() -> None:
    for stream in (StreamTask(), StreamTask(references="clean", dropout=1.0)):
        left_out = pack([with_pictures(stream)], SPEC)
        assert_equal(left_out, pack([replace(with_pictures(stream), references={})], SPEC))
    alone = with_pictures(StreamTask(references="clean"))
    assert pack([replace(alone, task=None)], SPEC).modalities["video"].num_tokens == 3


def test_what_is_given_is_counted_from_the_first_frame_on() -> None:
    clip = torch.zeros(3, 4, 4, 4)
    task = StreamTask(given="prefix", references="clean")
    given = replace(with_pictures(task), latents={"video": clip})
    video = pack([given], SPEC).modalities["video"]
    assert frames_of(video, Role.CLEAN) == [-2, -1, 0]
    assert frames_of(video, Role.NOISED) == [1, 2, 3]
    hole = StreamTask(given="outside", box=(0.0, 0.0, 0.5, 0.5), references="clean")
    video = pack([replace(with_pictures(hole), latents={"video": clip})], SPEC).modalities["video"]
    noised = video.position[video.role == Role.NOISED]
    assert noised.tolist() == [[0.5 * frame, 0.0, 0.0] for frame in range(4)]


def test_tasks_with_references_are_for_samples_that_have_some() -> None:
    tasks = {
        "edit": TaskConfig(streams={"video": StreamTask(references="clean")}),
        "group": TaskConfig(streams={"video": StreamTask(references="target")}),
        "plain": TaskConfig(),
    }
    keys = [SampleKey(0, slot, f"d:{slot}") for slot in range(60)]
    assert {draw_task(tasks, 0, key, ["video"]).name for key in keys} == {"plain"}
    found = {draw_task(tasks, 0, key, ["video"], ["video"]).name for key in keys}
    assert found == set(tasks)
    del tasks["plain"]
    with pytest.raises(TaskError, match="which has video and no reference pictures"):
        draw_task(tasks, 0, keys[0], ["video"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StreamTask(use="clean", references="clean"), "references: clean belong to what"),
        (
            lambda: TaskConfig(block_s=0.5, streams={"video": StreamTask(references="clean")}),
            "blocks begin with the clip",
        ),
    ],
)
def test_references_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_merging_packs_is_packing_all() -> None:
    tasks = list(TASKS.values())
    samples = [sample(task, number) for number, task in enumerate(tasks)]
    parts = [pack(samples[:5], SPEC), pack([], SPEC), pack(samples[5:], SPEC)]
    assert_equal(concatenate(parts), pack(samples, SPEC))
    assert len(split(parts[0].modalities["video"].latents, parts[0], "video")) == 5


def test_tasks_are_drawn_by_weight_and_by_nothing_but_the_key() -> None:
    tasks = {"a": TaskConfig(weight=3.0), "b": TaskConfig(levels="frame")}
    keys = [SampleKey(step, slot, f"d:{slot}") for step in range(40) for slot in range(50)]
    names = [draw_task(tasks, 0, key, ["video"]).name for key in keys]
    share = Counter(names)["a"] / len(names)
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / len(names))
    assert names == [draw_task(tasks, 0, key, ["video"]).name for key in keys]
    assert names != [draw_task(tasks, 1, key, ["video"]).name for key in keys]


def test_a_sample_gets_a_task_that_it_fits() -> None:
    tasks = {"v2a": TASKS["video to audio"], "t2v": TASKS["text to video"]}
    for slot in range(10):
        assert draw_task(tasks, 0, SampleKey(0, slot, "d:0"), ["video"]).name == "t2v"
    with pytest.raises(TaskError, match="no task of the recipe fits sample d:7, which has audio"):
        draw_task(tasks, 0, SampleKey(0, 0, "d:7"), ["audio"])


def test_absent_text_is_the_empty_caption_with_its_vectors() -> None:
    empty = {"text": torch.zeros(1, 5)}, {"text_pooled": torch.zeros(4), "size": torch.ones(1)}
    mix = TaskMix({"u": TASKS["unconditional"], "t": TaskConfig()}, 0, lambda: empty)
    text, conditions = (
        {"text": torch.ones(3, 5)},
        {"text_pooled": torch.ones(4), "size": torch.zeros(1)},
    )
    key = SampleKey(0, 0, "d:0")
    kept = mix.captions(DrawnTask("t", mix.tasks["t"], 0), key, text, conditions)
    assert kept == (text, conditions)
    got_text, got = mix.captions(DrawnTask("u", mix.tasks["u"], 0), key, text, conditions)
    assert got_text["text"] is empty[0]["text"]
    assert got == {"text_pooled": empty[1]["text_pooled"], "size": conditions["size"]}


def test_one_of_several_text_streams_takes_the_empty_caption_alone() -> None:
    names = ("text", "text_2")
    empty = (
        {name: torch.zeros(1, 5) for name in names},
        {f"{name}_pooled": torch.zeros(4) for name in names},
    )
    task = TaskConfig(streams={"text": StreamTask(use="absent")})
    mix = TaskMix({"one": task}, 0, lambda: empty)
    text = {name: torch.ones(3, 5) for name in names}
    vectors = {f"{name}_pooled": torch.ones(4) for name in names}
    got_text, got = mix.captions(DrawnTask("one", task, 0), SampleKey(0, 0, "d:0"), text, vectors)
    assert got_text == {"text": empty[0]["text"], "text_2": text["text_2"]}
    assert got["text_pooled"] is empty[1]["text_pooled"]
    assert got["text_2_pooled"] is vectors["text_2_pooled"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StreamTask(use="clean", given="prefix"), "leave one of them out"),
        (lambda: StreamTask(given="every"), "from 2"),
        (lambda: StreamTask(given="at"), "lists the frames"),
        (lambda: StreamTask(area=(0.5, 1.0)), "between 0 and 1"),
        (lambda: StreamTask(given="inside", box=(0.5, 0.5, 0.6, 0.2)), "within it"),
        (lambda: StreamTask(dropout=2.0), "0 to 1"),
        (lambda: StreamTask(loss_weight=-1.0), "negative"),
        (lambda: TaskConfig(weight=0.0), "positive"),
        (lambda: TaskConfig(block_s=-1.0), "seconds"),
        (lambda: TaskConfig(context=2), "needs block_s"),
        (lambda: video_blocks(), "blocks before them"),
        (lambda: TaskConfig(hidden={"video": ["video"]}), "must see itself"),
        (
            lambda: check({"t": TaskConfig(streams={"sound": StreamTask()})}),
            "'sound'; model.streams",
        ),
        (lambda: check({"t": TaskConfig(hidden={"video": ["sound"]})}), "'sound'; model.streams"),
        (lambda: check({"t": TaskConfig(streams={"text": StreamTask()})}), "output is false"),
        (lambda: check({"t": TaskConfig(streams={"video": StreamTask(use="clean")})}), "nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def video_blocks() -> TaskConfig:
    return TaskConfig(streams={"video": StreamTask(given="prefix")}, block_s=1.0)


def check(tasks: dict[str, TaskConfig]) -> None:
    check_tasks(tasks, {"text": False, "video": True})
