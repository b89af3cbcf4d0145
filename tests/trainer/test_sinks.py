"""What a run writes: no row twice over a resume, one wandb run, no credential, no hold-up."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kinodit.data.media import write_mp4, write_png
from kinodit.models.errors import ConfigError, MissingExtraError
from kinodit.trainer import services as services_module
from kinodit.trainer import sinks as sinks_module
from kinodit.trainer.jsonl import read_rows
from kinodit.trainer.services import WandbSink, scalars
from kinodit.trainer.sinks import LogConfig, Sinks, stored_run_id
from tests.support.wandb_offline import offline_runs, read_offline_run

OFF = LogConfig(wandb="off")


def train_row(step: int, loss: float) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "time_s": 1.7e9 + step,
        "loss": loss,
        "lr": 1e-3,
        "noise_bins": {"video": [[0.0, 0.1, loss / 2, 8], [0.1, 0.2, loss, 4]]},
    }


def sample(run_dir: Path, step: int) -> list[dict[str, Any]]:
    folder = run_dir / "samples" / f"step-{step:08d}"
    video = np.full((4, 32, 32, 3), 7 * step, dtype=np.uint8)
    write_mp4(folder / "0.mp4", video, 4.0)
    write_png(folder / "1.png", video[0])
    return [
        {"prompt": "a kite moves up", "file": "0.mp4"},
        {"prompt": "a still kite", "file": "1.png"},
    ]


def steps(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_rows(run_dir / "metrics.jsonl") if row is not None]


def warnings_of(run_dir: Path) -> list[str]:
    rows = [row for row in read_rows(run_dir / "events.jsonl") if row is not None]
    return [row["message"] for row in rows if row["event"] == "warning"]


@pytest.mark.parametrize(
    "fields", [{"every_steps": 0}, {"wandb_project": ""}, {"wandb_project": "a/b"}]
)
def test_config_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        LogConfig(**fields)


@pytest.mark.parametrize(
    "config", [LogConfig(), LogConfig(wandb="off", tensorboard=True)], ids=["wandb", "tensorboard"]
)
def test_missing_extra_is_said_before_anything_is_written(
    config: LogConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kinodit\[(wandb|tensorboard)\]'"):
        Sinks(tmp_path / "run", config, None, False, {})
    assert not (tmp_path / "run").exists()


def test_resume_doubles_no_row_and_loses_none(tmp_path: Path) -> None:
    first = Sinks(tmp_path, OFF, None, False, {})
    for step in range(1, 8):
        first.metrics(train_row(step, 1.0))
    first.event("checkpoint", 4, "saved")
    first.close()
    second = Sinks(tmp_path, OFF, None, True, {}, resume_step=4)
    second.event("resume", 4, "from step 4")
    for step in range(5, 9):
        second.metrics(train_row(step, 0.5))
    second.close()
    assert steps(tmp_path) == list(range(1, 9))
    losses = [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl") if row]
    assert losses == [1.0] * 4 + [0.5] * 4
    events = [row for row in read_rows(tmp_path / "events.jsonl") if row]
    assert [row["event"] for row in events] == ["checkpoint", "resume"]
    assert events[1]["kind"] == "event" and events[1]["step"] == 4
    assert abs(events[1]["time_s"] - time.time()) < 60


def test_starting_over_without_a_checkpoint_starts_the_rows_over(tmp_path: Path) -> None:
    for _ in range(2):
        sinks = Sinks(tmp_path, OFF, None, False, {})
        sinks.metrics(train_row(0, 1.0))
        sinks.metrics(train_row(1, 1.0))
        sinks.close()
    assert steps(tmp_path) == [0, 1]


def test_environment_is_described(tmp_path: Path) -> None:
    Sinks(tmp_path, OFF, None, False, {}, world_size=4).close()
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["num_ranks"] == 4
    assert set(environment) == {"kinodit", "torch", "python", "system", "device", "num_ranks"}


def test_run_id_is_made_once(tmp_path: Path) -> None:
    made = stored_run_id(tmp_path)
    assert len(made) == 12
    assert stored_run_id(tmp_path) == stored_run_id(tmp_path, "other") == made


def test_scalars_have_a_path_per_number() -> None:
    row = train_row(3, 0.5) | {"note": "text"}
    assert scalars(row) == {
        "train/loss": 0.5,
        "train/lr": 1e-3,
        "train/noise_bins/video/0.05": 0.25,
        "train/noise_bins/video/0.15": 0.5,
    }
    validation = {"kind": "validation", "step": 3, "bins": {"video": {"0.1": 0.7}}}
    assert scalars(validation) == {"validation/bins/video/0.1": 0.7}


@pytest.mark.slow
def test_wandb_offline_run_reads_back(tmp_path: Path) -> None:
    run_dir = tmp_path / "kites"
    config = {"model": {"depth": 2}, "hub": {"api_key": "canary-in-config"}}
    for resumed, first_step in ((False, 1), (True, 3)):
        sinks = Sinks(run_dir, LogConfig(), None, resumed, config, resume_step=2 if resumed else 0)
        for step in range(first_step, first_step + 3):
            sinks.metrics(train_row(step, 1.0 / step))
        sinks.metrics({"kind": "validation", "step": step, "loss/video": 0.25})
        sinks.media(step, sample(run_dir, step))
        sinks.close()
        time.sleep(1.1)  # wandb names the folder of each part by the second
    assert warnings_of(run_dir) == []
    parts = [read_offline_run(folder) for folder in offline_runs(run_dir)]
    assert len(parts) == 2
    assert {part.id for part in parts} == {(run_dir / "run_id").read_text().strip()}
    assert all(part.finished and part.project == "kinodit" for part in parts)
    assert parts[0].config["model"] == {"depth": 2}
    assert parts[0].config["hub"] == {"api_key": "***"}
    for part, first_step in zip(parts, (1, 3), strict=True):
        logged = list(range(first_step, first_step + 3))
        assert [row["_step"] for row in part.history] == logged
        assert [row["train/loss"] for row in part.history] == [1.0 / step for step in logged]
        last = part.history[-1]
        assert last["validation/loss/video"] == 0.25
        (clip,) = last["samples/clips/videos"]
        assert clip["_type"] == "video-file" and last["samples/clips/captions"] == [
            "a kite moves up"
        ]
        folder = offline_runs(run_dir)[0 if first_step == 1 else 1] / "files"
        source = run_dir / "samples" / f"step-{logged[-1]:08d}" / "0.mp4"
        assert (folder / clip["path"]).read_bytes() == source.read_bytes()
        assert last["samples/images/count"] == 1


def test_no_credential_in_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary" + "0" * 34)
    monkeypatch.setenv("HF_TOKEN", "canary-of-the-hub")
    config = {"store": {"secret": "canary-in-config", "url": "s3://me:canary-in-url@host/x"}}
    sinks = Sinks(tmp_path, LogConfig(tensorboard=True), None, False, config)
    sinks.metrics(train_row(1, 1.0))
    sinks.event("warning", 1, "refused canary-of-the-hub and api_key=canary-in-message")
    sinks.close()
    assert warnings_of(tmp_path) == ["refused *** and api_key=***"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6
    for path in files:
        assert b"canary" not in path.read_bytes(), path


def test_tensorboard_reads_back_and_hides_repeated_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LogConfig(wandb="off", tensorboard=True)
    for resumed, first_step, loss in ((False, 1, 1.0), (True, 3, 0.5)):
        sinks = Sinks(tmp_path, config, None, resumed, {}, resume_step=2 if resumed else 0)
        for step in range(first_step, 5):
            sinks.metrics(train_row(step, loss))
        sinks.media(4, sample(tmp_path, 4))
        sinks.close()
        time.sleep(1.1)  # event files are named, and read in order, by the second
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    events = accumulator.Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [
        (1, 1.0),
        (2, 1.0),
        (3, 0.5),
        (4, 0.5),
    ]
    assert events[0].wall_time == 1.7e9 + 1
    image = accumulator.Images("samples/0")[-1]
    assert image.step == 4 and image.encoded_image_string.startswith(b"GIF89a")
    assert accumulator.Images("samples/1")[-1].encoded_image_string.startswith(b"\x89PNG")


class Stuck(WandbSink):
    """A service that does not answer until it is let go."""

    released = threading.Event()

    def open(self) -> None:
        self.released.wait(20)

    def metrics(self, row: Any) -> None: ...

    def close(self) -> None: ...


class Broken(WandbSink):
    """A service that refuses, with an error of its own that names a credential."""

    def open(self) -> None:
        class ServiceError(Exception):
            pass

        raise ServiceError("401 for api_key=canary-123\n at wandb")


@pytest.fixture
def stuck() -> Iterator[type[Stuck]]:
    Stuck.released.clear()
    yield Stuck
    Stuck.released.set()


def test_a_broken_service_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks_module, "WandbSink", Broken)
    with caplog.at_level(logging.WARNING, logger="kinodit"):
        sinks = Sinks(tmp_path, LogConfig(), None, False, {})
        for step in range(50):
            sinks.metrics(train_row(step, 1.0))
            time.sleep(0.001)
        sinks.close()
    assert steps(tmp_path) == list(range(50))
    (record,) = caplog.records
    assert record.message == (
        "wandb is off for the rest of this run (ServiceError: 401 for api_key=*** at wandb); "
        "metrics.jsonl goes on"
    )
    events = [row for row in read_rows(tmp_path / "events.jsonl") if row]
    assert [(row["event"], row["message"]) for row in events] == [("warning", record.message)]


def test_a_stuck_service_holds_up_neither_steps_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: type[Stuck]
) -> None:
    monkeypatch.setattr(sinks_module, "WandbSink", stuck)
    monkeypatch.setattr(services_module, "CLOSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(sinks_module, "MAX_PENDING", 100)
    start = time.perf_counter()
    sinks = Sinks(tmp_path, LogConfig(), None, False, {})
    for step in range(80):
        sinks.metrics(train_row(step, 1.0))
    sinks.close()
    assert time.perf_counter() - start < 2.0
    (event,) = read_rows(tmp_path / "events.jsonl")
    assert event is not None and "not finished after 0 s" in event["message"]


def test_rows_for_a_stuck_service_do_not_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: type[Stuck]
) -> None:
    monkeypatch.setattr(sinks_module, "WandbSink", stuck)
    monkeypatch.setattr(sinks_module, "MAX_PENDING", 100)
    sinks = Sinks(tmp_path, LogConfig(), None, False, {})
    for step in range(200):
        sinks.metrics(train_row(step, 1.0))
    sinks.close()
    assert steps(tmp_path) == list(range(200))
    (event,) = read_rows(tmp_path / "events.jsonl")
    assert event is not None and "101 rows wait for it" in event["message"]


@pytest.mark.slow
def test_an_unreachable_server_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    start = time.perf_counter()
    sinks = Sinks(tmp_path, LogConfig(wandb="online"), None, False, {})
    for step in range(100):
        sinks.metrics(train_row(step, 1.0))
    assert time.perf_counter() - start < 1.0
    # A busy machine may take longer to find that nobody answers than the end of a run waits.
    while not warnings_of(tmp_path) and time.perf_counter() - start < 60:
        time.sleep(0.1)
        step += 1
        sinks.metrics(train_row(step, 1.0))
    sinks.close()
    assert steps(tmp_path) == list(range(step + 1))
    (event,) = read_rows(tmp_path / "events.jsonl")
    assert event is not None and "`wandb sync` uploads RUN/wandb later" in event["message"]
