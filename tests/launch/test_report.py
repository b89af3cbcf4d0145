"""The report of any run folder: complete, self-contained, without secrets."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kinodit.launch import cli
from kinodit.launch.report import write_report
from kinodit.launch.report.read import ReportError, read_run, run_state
from kinodit.launch.report.series import MAX_POINTS, train_columns, validation_columns
from kinodit.trainer.motion import MotionResult
from tests.support.fake_run import (
    CANARY,
    LEVELS,
    PROMPTS,
    START_S,
    add_evaluation,
    add_samples,
    make_run,
    train_row,
    write_samples,
)
from tests.support.pages import LONG_AFTER, page_data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 200 rows with samples at three steps."""
    folder = tmp_path_factory.mktemp("runs") / "t2v_stamps"
    return make_run(folder, sample_steps=(400, 1200, 2000))


@pytest.fixture(scope="module")
def html(run_dir: Path) -> str:
    return write_report(run_dir, now=LONG_AFTER).read_text()


def test_header_says_what_the_run_is(html: str) -> None:
    text = re.sub(r"<script.*?</script>|<style.*?</style>", "", html, flags=re.DOTALL)
    for part in (
        "<h1>t2v_stamps</h1>",
        '<span class="state good">finished</span>',
        "2,000 of 2,000",
        "2 ranks on Example processor, 2 cores",
        "kinodit 0.1.0, torch 2.13.0+cpu, python 3.11.7",
        "<dt>resumed</dt><dd>once</dd>",
        "2026-11-18 11:06:40 UTC",
    ):
        assert part in text, part
    tiles = re.findall(r'tile-label">(.*?)<', text)
    assert tiles == [
        "Loss",
        "Validation loss",
        "Throughput",
        "MFU",
        "Data wait",
        "Peak memory",
    ]


def test_nothing_is_fetched_from_anywhere(html: str) -> None:
    assert "default-src 'none'" in html
    markup = re.sub(r'<script type="application/json".*?</script>', "", html, flags=re.DOTALL)
    assert not re.search(r'(?:src|href)="(?!#|data:)', markup)
    assert not re.search(r"@import|url\(\s*['\"]?(?:https?:|//)", markup)
    for address in re.findall(r"https?://[^\s\"'<>]+", markup):
        assert address == "http://www.w3.org/2000/svg"


def test_series_are_those_of_the_rows(html: str, run_dir: Path) -> None:
    data = page_data(html)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert data["train"]["step"] == [row["step"] for row in train]
    assert data["train"]["rows_per_point"] == 1
    for key in ("loss", "lr", "grad_norm", "tokens_per_s", "samples_per_s", "mfu"):
        column = data["train"]["columns"][key]
        assert "low" not in column
        assert column["mean"] == pytest.approx([row[key] for row in train], rel=1e-5)
    bins = data["train"]["bins"]["video"]
    assert bins["edges"][3] == [0.3, 0.4] and len(bins["values"]) == 10
    third = [row["noise_bins"]["video"][3][2] for row in train]
    assert bins["values"][3] == pytest.approx(third, rel=1e-5)
    parts = data["train"]["parts"]
    assert list(parts) == ["compute", "encoding", "data", "checkpoint", "evaluation", "other"]
    whole = [sum(part[index] for part in parts.values()) for index in range(len(train))]
    assert whole == pytest.approx([row["step_s"] for row in train], rel=1e-3)
    validation = data["validation"]
    assert validation["bins"]["video"]["levels"] == list(LEVELS)
    assert set(validation["columns"]) == {"loss/video", "loss_shuffled_captions/video"}
    assert data["marks"] == [
        {"step": 800, "event": "resume"},
        {"step": 1000, "event": "warning"},
    ]


def test_no_more_than_the_peak_is_shown_in_use(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", sample_steps=())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    trained[-1]["mfu"], trained[-2]["mfu"] = 1.31, 0.25
    del trained[-3]["mfu"]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    html = write_report(run, now=LONG_AFTER).read_text()
    column = page_data(html)["train"]["columns"]["mfu"]["mean"]
    assert column[-3:] == [None, 0.25, None] and max(filter(None, column)) < 1
    assert f"MFU is left out of 2 of {len(trained)} rows" in html
    (run / "metrics.jsonl").write_text(
        "".join(f"{json.dumps({**row, 'mfu': 2.0})}\n" for row in rows)
    )
    html = write_report(run, now=LONG_AFTER).read_text()
    assert "mfu" not in page_data(html)["train"]["columns"]
    assert '<div class="tile-label">MFU' not in html


def test_clips_are_inside(html: str, run_dir: Path) -> None:
    samples = page_data(html)["samples"]
    assert [sample["step"] for sample in samples] == [400, 1200, 2000]
    for sample in samples:
        assert [entry["prompt"] for entry in sample["entries"]] == list(PROMPTS)
    entry = samples[1]["entries"][2]
    head, _, body = entry["src"].partition(",")
    assert head == "data:video/mp4;base64"
    source = run_dir / "samples" / "step-00001200" / "002.mp4"
    assert base64.b64decode(body) == source.read_bytes()
    assert (entry["fps"], entry["width"], entry["seed"], entry["guidance"]) == (8.0, 64, 2, 4.0)


def test_clips_on_request_and_their_measured_directions_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", total_steps=100, every=50)
    html = write_report(run, now=LONG_AFTER).read_text()
    assert "Clips on request" not in html and "Moves as told" not in html
    write_samples(run / "samples" / "manual", 1.0, ["a kite moves <b>up</b>"])
    write_samples(run / "samples" / "motion", 1.0, [f"prompt {index}" for index in range(30)])
    MotionResult(32, 28, {"left": {"left": 28, "up": 4}}).save(run)
    html = write_report(run, now=LONG_AFTER).read_text()
    shown = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert shown == ["a kite moves &lt;b&gt;up&lt;/b&gt;", *(f"prompt {i}" for i in range(24))]
    clip = base64.b64encode((run / "samples" / "manual" / "000.mp4").read_bytes()).decode()
    assert f'src="data:video/mp4;base64,{clip}"' in html
    tile = html[html.index("Moves as told") :]
    assert re.search(r">\s*88\s*<", tile[:400]) and "of 32 clips; chance is 25 %" in tile[:400]


def test_pictures_are_shown_before_what_was_drawn_after_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", total_steps=100, every=50)
    folder = run / "samples" / "manual"
    write_samples(folder, 1.0, ["make it blue"])
    index = folder / "index.json"
    (entry,) = json.loads(index.read_text())
    for number in range(2):
        (folder / f"000.ref{number}.png").write_bytes(b"picture %d" % number)
    names = ["000.ref0.png", "000.ref1.png", "absent.png", "../../config.yaml"]
    index.write_text(json.dumps([{**entry, "pictures": names}]))
    html = write_report(run, now=LONG_AFTER).read_text()
    section = html[html.index('<section id="drawn">') : html.index('<section id="training">')]
    shown = re.findall(r'<img class="pixels" src="(.*?)" alt="picture \d before">', section)
    assert [base64.b64decode(src.partition(",")[2]) for src in shown] == [
        b"picture 0",
        b"picture 1",
    ]
    assert section.index("before") < section.index("<video")


def test_the_newest_evaluation_is_shown_by_task(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", total_steps=100, every=50)
    assert 'id="evaluation"' not in write_report(run, now=LONG_AFTER).read_text()
    add_evaluation(run, 50)
    newest = add_evaluation(run, 100)
    figures = json.loads((newest / "evaluation.json").read_text())
    figures["tasks"]["first_frame"]["fill"]["fill_error"] = 0.0777
    (newest / "evaluation.json").write_text(json.dumps(figures))
    html = write_report(run, now=LONG_AFTER).read_text()
    section = html[html.index('<section id="evaluation">') : html.index('<section id="training">')]
    assert "step 100, on the validation set" in section
    table = re.sub(r"\s+", " ", section[section.index("<tbody>") : section.index("</tbody>")])
    cells = [re.findall(r"<td[^>]*>(?:<b>)?(.*?)(?:</b>)?</td>", r) for r in table.split("</tr>")]
    assert [row[:3] for row in cells if row] == [
        ["joint", "video", "0.4120"],
        ["joint", "audio", "0.2310"],
        ["first frame", "video", "0.2870"],
        ["sound of video", "audio", "0.1540"],
    ]
    assert all(len(row) == 3 + len(LEVELS) for row in cells if row)
    assert re.findall(r'evaluated-title"><b>(.*?)</b><small>(\d+)', section) == [
        ("from captions", "64"), ("first frame", "64"), ("sound of video", "64"), ("example", "0"),
    ]  # fmt: skip
    assert "<b>0.0777</b><small>copy 0.134</small>" in section
    assert "<b>0.31</b><small>data 0.07</small><small>chance 2.76</small>" in section
    assert section.count("<video") == 6 + 3 + 3
    sheets = re.findall(r'<img src="data:image/png;base64,(.*?)" alt="contact sheet">', section)
    files = [newest, newest / "tasks" / "first_frame", newest / "tasks" / "sound_of_video"]
    assert [base64.b64decode(src) for src in sheets] == [
        (folder / "sheet.png").read_bytes() for folder in files
    ]
    assert "No sample of the validation set has what it is given" in section


def test_an_evaluation_that_is_no_evaluation_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", total_steps=100, every=50)
    folder = run / "evaluation" / "step-00000100"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text("[1")
    html = write_report(run, now=LONG_AFTER).read_text()
    assert 'id="evaluation"' not in html and "evaluation.json could not be read" in html
    odd = {"step": "<b>", "loss": {"<i>": {"video": {"mean": "nan", "0.5": None}}}, "tasks": [3]}
    (folder / "evaluation.json").write_text(json.dumps(odd))
    html = write_report(run, now=LONG_AFTER).read_text()
    assert "step &lt;b&gt;" in html and "&lt;i&gt;" in html and "<td><i>" not in html


def test_config_and_events_are_there_and_secrets_are_not(html: str) -> None:
    assert CANARY not in html
    assert "wandb_api_key: &#39;***&#39;" in html
    assert "token_budget: 4096" in html
    assert html.count("<details>") == 6
    rows = re.findall(r'<tr data-event="(\w+)">', html)
    assert rows[0] == "stop" and rows[-1] == "start" and rows.count("checkpoint") == 5
    assert "wandb is off for the rest of this run (401, api_key=***)" in html


def test_text_of_the_run_cannot_become_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", total_steps=100, every=50)
    evil = "</script><img src=x onerror=alert(1)>"
    add_samples(run, 100, 1.0, [evil])
    with (run / "events.jsonl").open("a") as file:
        row = {"kind": "event", "time_s": START_S, "step": 100, "event": "stop", "message": evil}
        file.write(json.dumps(row) + "\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {evil: {"note": evil}}))
    html = write_report(run, now=LONG_AFTER).read_text()
    assert "<img src=x" not in html
    assert page_data(html)["samples"][0]["entries"][0]["prompt"] == evil


def test_an_index_cannot_include_other_files(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", total_steps=100, every=50)
    (tmp_path / "private.mp4").write_bytes(b"private")
    folder = run / "samples" / "step-00000100"
    folder.mkdir(parents=True)
    index = [{"prompt": "a", "file": "../../../private.mp4"}, {"prompt": "b", "file": "gone.mp4"}]
    (folder / "index.json").write_text(json.dumps(index))
    html = write_report(run, now=LONG_AFTER).read_text()
    assert page_data(html)["samples"] == [{"step": 100, "entries": []}]
    assert "2 sampled files are named in an index but not there." in html


def test_many_rows_are_thinned_and_no_spike_is_lost() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    rows = [train_row(step, 1, rng) for step in range(1, 4001)]
    rows[1234]["loss"] = 77.0
    rows[1300]["loss"] = "NaN"
    columns = train_columns(rows)
    assert columns["rows_per_point"] == 3
    assert len(columns["step"]) <= MAX_POINTS and columns["step"][-1] == 4000
    loss = columns["columns"]["loss"]
    assert max(loss["high"]) == 77.0
    group = [row["loss"] for row in rows[300:303]]
    assert loss["mean"][100] == pytest.approx(sum(group) / 3, rel=1e-5)
    assert loss["low"][100] == pytest.approx(min(group), rel=1e-5)
    assert columns["broken"] == [1301]
    finite = [rows[1299]["loss"], rows[1301]["loss"]]
    assert loss["mean"][433] == pytest.approx(sum(finite) / 2, rel=1e-5)
    bins = [row["noise_bins"]["video"][7] for row in rows[300:303]]
    mean = sum(loss * count for _, _, loss, count in bins) / sum(count for *_, count in bins)
    assert columns["bins"]["video"]["values"][7][100] == pytest.approx(mean, rel=1e-5)
    hours = sum(row["step_s"] for row in rows) / 3600
    assert columns["time_h"][-1] == pytest.approx(hours, rel=1e-5)
    assert len(json.dumps(columns)) < 2_000_000


def test_noise_levels_that_hardly_occur_do_not_show_chance() -> None:
    def row(step: int, loss: float) -> dict[str, Any]:
        bins = [[0.0, 0.5, 1000.0, 1], [0.5, 1.0, loss, 99]]
        return {"kind": "train", "step": step, "noise_bins": {"video": bins}}

    columns = train_columns([row(step, 2.0 if step <= 50 else 1.0) for step in range(1, 101)])
    assert columns["bins"]["video"]["rare"] == [True, False]
    assert columns["profiles"] == [
        {"step": 10, "curves": {"video": [[0.75, 2.0]]}},
        {"step": 30, "curves": {"video": [[0.75, 2.0]]}},
        {"step": 60, "curves": {"video": [[0.75, 1.0]]}},
        {"step": 100, "curves": {"video": [[0.75, 1.0]]}},
    ]
    assert train_columns([row(step, 2.0) for step in range(1, 8)])["profiles"] == []


def test_bins_and_levels_that_come_and_go_stay_aligned() -> None:
    rows = [
        {"step": 1, "noise_bins": {"video": [[0.5, 1.0, 2.0, 1]]}},
        {"step": 2, "noise_bins": {"video": [[0.0, 0.5, 1.0, 1]], "audio": [[0.0, 1.0, 3.0, 2]]}},
    ]
    bins = train_columns(rows)["bins"]
    assert bins["video"]["edges"] == [(0.0, 0.5), (0.5, 1.0)]
    assert bins["video"]["values"] == [[None, 1.0], [2.0, None]]
    assert bins["audio"]["values"] == [[None, 3.0]]
    validation = validation_columns(
        [
            {"step": 1, "bins": {"video": {"0.9": 2.0}}},
            {"step": 2, "bins": {"video": {"0.1": 1.0, "0.9": 1.5}}},
        ]
    )
    assert validation["bins"]["video"] == {
        "levels": [0.1, 0.9],
        "values": [[None, 1.0], [2.0, 1.5]],
    }


def test_samples_above_the_limit_are_spread_and_counted(tmp_path: Path) -> None:
    steps = range(100, 601, 100)
    run = make_run(
        tmp_path / "run", total_steps=600, every=50, sample_steps=steps, prompts=PROMPTS[:1]
    )
    size = sum(path.stat().st_size for path in (run / "samples").rglob("*.mp4"))
    limit = size * 4 / 3 / 2**20
    everything = write_report(run, now=LONG_AFTER, max_media_mib=limit * 1.01).read_text()
    assert len(page_data(everything)["samples"]) == 6 and "are left out" not in everything
    html = write_report(run, now=LONG_AFTER, max_media_mib=limit / 1.8).read_text()
    kept = [sample["step"] for sample in page_data(html)["samples"]]
    assert kept[0] == 100 and kept[-1] == 600 and 2 <= len(kept) < 6
    assert f"Samples of {6 - len(kept)} of 6 steps are left out" in html
    nothing = write_report(run, now=LONG_AFTER, max_media_mib=0).read_text()
    assert page_data(nothing)["samples"] == []


@pytest.mark.parametrize(
    ("last_step", "stopped", "seconds_later", "expected"),
    [
        (100, True, 1e6, "finished"),
        (60, True, 1e6, "stopped"),
        (60, False, 1e6, "interrupted"),
        (60, False, 100.0, "running"),
    ],
)
def test_state(
    tmp_path: Path, last_step: int, stopped: bool, seconds_later: float, expected: str
) -> None:
    run = make_run(
        tmp_path / "run", total_steps=100, last_step=last_step, every=10, stopped=stopped
    )
    now = START_S + 0.5 * last_step + seconds_later
    assert run_state(read_run(run), now).label == expected
    assert f">{expected}</span>" in write_report(run, now=now).read_text()


def test_a_run_of_slow_steps_is_not_called_interrupted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", total_steps=100, last_step=30, every=10, stopped=False)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if '"train"' in line]
    for index, row in enumerate(rows):
        row["time_s"] = START_S + 600.0 * index
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_state(read_run(run), START_S + 1200 + 1200).label == "running"


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.yaml", "events.jsonl"])
def test_each_file_may_be_missing(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path / "run", total_steps=100, every=10)
    (run / missing).unlink()
    (run / "environment.json").unlink()
    assert page_data(write_report(run, now=LONG_AFTER).read_text())["samples"] == []


def test_unreadable_parts_are_left_out_and_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", total_steps=100, every=10, sample_steps=(100,))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"train","step":110,"lo')
    (run / "config.yaml").write_text("a: [")
    (run / "samples" / "step-00000100" / "index.json").write_text("[{")
    html = write_report(run, now=LONG_AFTER).read_text()
    for note in (
        "1 line of metrics.jsonl could not be read",
        "config.yaml could not be read",
        "samples/step-00000100 could not be read",
    ):
        assert note in html
    assert page_data(html)["train"]["step"][-1] == 100


def test_steps_that_were_logged_twice_count_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", total_steps=100, every=10)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 50, "loss": 9.0, "step_s": 1.0}) + "\n")
    columns = page_data(write_report(run, now=LONG_AFTER).read_text())["train"]
    assert columns["step"] == list(range(10, 101, 10))
    assert columns["columns"]["loss"]["mean"][4] == 9.0


def test_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    assert cli.main(["report", str(run_dir), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{output} (") and "MiB)" in printed
    assert output.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("place", "message"),
    [("absent", "no run folder at"), (".", "holds neither config.yaml nor metrics.jsonl")],
)
def test_command_on_what_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, message: str
) -> None:
    assert cli.main(["report", str(tmp_path / place)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_a_page_that_cannot_be_written_is_an_error(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="--output"):
        write_report(run_dir, tmp_path / "absent" / "page.html")
