"""What a task is given and draws, in the words of the report."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from kinodit.launch.report.told import Told, told
from kinodit.trainer.config import config_to_yaml, load_config
from tests.support.ranks import ROOT


def config_of(recipe: str) -> dict[str, Any]:
    """What a run of the recipe writes to its config.yaml."""
    config = yaml.safe_load(config_to_yaml(load_config(ROOT / "configs" / f"{recipe}.yaml")))
    assert isinstance(config, dict)
    return config


EXPECTED = {
    "av_joint_tiny": {
        "": Told("caption", "video, sound"),
        "joint": Told("caption", "video, sound"),
        "sound_of_video": Told("caption, video", "sound"),
        "video_of_sound": Told("caption, sound", "video"),
        "animate": Told("caption, first frame of the video", "the rest of the video, sound"),
        "no such task": Told(),
    },
    "i2v_masks_tiny": {
        "text_to_video": Told("caption", "video"),
        "both_ends": Told("caption, first and last frame of the video", "the rest of the video"),
        "any_frames": Told(
            "caption, 1 to 3 frames of the video, anywhere", "the rest of the video"
        ),
        "what_led_there": Told("caption, last 2 to 4 frames of the video", "the rest of the video"),
        "between": Told("caption, one frame in 2 to 4 of the video", "the rest of the video"),
        "inpainting": Told("caption, the video around a box", "the rest of the video"),
        "outpainting": Told("caption, a box of the video", "the rest of the video"),
    },
    "incontext_edit_tiny": {
        "": Told("caption", "picture"),
        "edit": Told("caption, reference pictures", "picture"),
        "group": Told("caption", "a group of pictures"),
    },
    "blockwise_ar_tiny": {"blocks": Told("caption", "video in blocks of 0.5 s")},
}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_tasks_of_the_recipes(recipe: str) -> None:
    config = config_of(recipe)
    for task, expected in EXPECTED[recipe].items():
        assert told(config, task) == expected, task


def test_stills_are_pictures_and_streams_may_be_away() -> None:
    config = config_of("t2iv_tiny")
    assert told(config, "", stills=True) == Told("caption", "picture")
    config["model"]["streams"]["image"] = {"output": True}
    assert told(config, "", stills=True) == Told("caption", "picture")
    assert told(config, "") == Told("caption", "video")
    streams = {"text": {"use": "absent"}, "video": {"use": "noise"}}
    config["model"]["streams"]["audio"] = {"output": True}
    config["tasks"] = {"alone": {"streams": streams}}
    assert told(config, "alone") == Told("", "sound")


def test_a_config_of_any_kind_is_no_error() -> None:
    assert told({}, "") == told({"model": 3, "tasks": [1]}, "joint") == Told()
    odd: dict[str, Any] = {
        "model": {"streams": {"video": None}},
        "tasks": {"a": {"streams": {"video": [2]}}},
    }
    assert told(odd, "a") == Told("", "video")
    odd["tasks"]["a"] = {"streams": {"video": {"given": "prefix", "frames": "x"}}, "block_s": "y"}
    assert told(odd, "a") == Told("first frame of the video", "the rest of the video")
