"""Every kind of pretrained features has its figures, beside those that need no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kinodit.models.encoders.features import Extractor, ExtractorConfig, Kind
from kinodit.trainer.evaluation.figures import Measured, Media, figures_of, measure, of_generated
from kinodit.trainer.evaluation.table import sample_rows
from kinodit.trainer.evaluation.truth import Told


@dataclass
class Levels:
    """Stands for a pretrained model: all that it sees is how bright, all that it hears how loud."""

    config: ExtractorConfig

    def of_video(self, video: Tensor) -> Tensor:
        return video.double().mean((0, 1, 2))

    def of_sound(self, sound: Tensor, rate_hz: int) -> Tensor:
        return sound.double().square().mean(1).repeat(2)

    def agreement(self, video: Tensor, caption: str) -> float:
        return len(caption) / 10

    def changes(
        self, video: Tensor, fps: float, sound: Tensor, rate_hz: int
    ) -> tuple[Tensor, Tensor]:
        size = round(rate_hz / fps)
        bright = video.double().mean((1, 2, 3))
        loud = sound.double().abs().mean(0)[: len(video) * size].view(len(video), size).mean(1)
        return bright.diff().abs(), loud.diff().abs()


def extractors(*kinds: Kind) -> dict[str, Extractor]:
    made = {}
    for kind in kinds:
        sound_path = "there" if kind == "synchrony" else ""
        config = ExtractorConfig(kind=kind, path="there", sound_path=sound_path)
        made[f"our {kind}"] = cast(Extractor, Levels(config))
    return made


ALL = extractors("picture", "video", "sound", "clip_score", "synchrony")


def clip(flash: int, click: int, level: int = 0) -> Media:
    video = torch.full((8, 8, 8, 3), level, dtype=torch.uint8)
    video[flash:] += 100
    sound = torch.zeros(1, 8000)
    sound[:, click * 1000 :] = 0.5
    return Media(video, 8.0, sound, 8000)


def measured(*clips: Media) -> list[Measured]:
    return [measure(place, one, "a cat", Told(), ALL) for place, one in enumerate(clips)]


def test_every_kind_of_extractor_has_its_figure() -> None:
    made = measured(*(clip(2 + n, 4 + n, 3 * n) for n in range(4)))
    real = measured(*(clip(2 + n, 2 + n, 5 * n) for n in range(4)))
    figures = figures_of(made, real, ["video", "audio"])
    for name, kind in (("fid", "picture"), ("kid", "picture"), ("fvd", "video"), ("fad", "sound")):
        assert set(figures[name]) == {"embedded", f"our {kind}"}, name
    assert figures["clip_score"] == {"our clip_score": 0.5}
    (lags,) = figures["av_synchrony"].values()
    assert lags["lag_frames"] == 2 and lags["within_a_frame"] == 0
    assert lags["lag_frames_real"] == 0 and lags["within_a_frame_real"] == 1
    assert lags["lag_frames_chance"] == 3
    row = next(row for row in sample_rows(figures) if row.label.startswith("picture to sound"))
    assert row.label == "picture to sound, frames (our synchrony)" and row.value == "2"
    assert row.beside == (("data", "0"), ("chance", "3"))
    share = next(row for row in sample_rows(figures) if "within a frame" in row.label)
    assert (share.value, share.beside) == ("0.0 %", (("data", "100.0 %"), ("chance", "25.0 %")))


def test_clips_without_sound_and_stills_have_no_synchrony() -> None:
    whole = clip(2, 3)
    assert whole.video is not None
    silent = Media(whole.video, 8.0, None, 0)
    still = Media(whole.video[:1], 8.0, whole.sound, 8000)
    assert [bool(one.changes) for one in measured(whole, silent, still)] == [True, False, False]
    assert "av_synchrony" not in figures_of(measured(silent), measured(silent), ["video"])
    alone = figures_of(measured(whole), measured(silent), ["video"])["av_synchrony"]
    assert set(alone["our synchrony"]) == {
        "lag_frames", "within_a_frame", "lag_frames_chance", "within_a_frame_chance",
    }  # fmt: skip


def test_what_was_given_is_not_counted_as_found() -> None:
    kinds = ("object", "direction", "sound", "everything_named")
    truth = {f"{name}{of}": 1.0 for name in kinds for of in ("", "_real", "_chance")}
    truth |= {"colour_error": 0.1, "colour_error_other": 0.2, "onset_lag_frames": 0.5}
    assert of_generated(truth, ["video", "audio"]) == truth
    sound = {"sound", "sound_real", "sound_chance", "onset_lag_frames"}
    assert set(of_generated(truth, ["audio"])) == sound
    video = of_generated(truth, ["video"])
    assert set(video).isdisjoint(sound - {"onset_lag_frames"}) and "everything_named" not in video
    assert video["object"] == 1 and video["colour_error_other"] == 0.2
    silent = {name: value for name, value in truth.items() if not name.startswith("sound")}
    assert of_generated(silent, ["video"]) == silent, "there was no sound to give"
