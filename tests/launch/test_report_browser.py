"""The report as a browser shows it, clips and charts."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
import yaml

from kinodit.launch.report import write_report
from tests.support.fake_run import PROMPTS, START_S, make_run, write_samples
from tests.support.pages import CHROMIUM, LONG_AFTER, browse, page_data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 200 rows with samples at three steps."""
    folder = tmp_path_factory.mktemp("runs") / "t2v_stamps"
    return make_run(folder, sample_steps=(400, 1200, 2000))


def test_what_was_given_is_shown_beside_what_was_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", total_steps=100, every=50, sample_steps=(100,))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] = {"streams": {"text": {"output": False}, "video": {"output": True}}}
    config["tasks"] = {"first_frame": {"streams": {"video": {"given": "prefix"}}}}
    config["sample"] = {"task": "first_frame"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for folder in (run / "samples" / "manual", run / "samples" / "step-00000100"):
        write_samples(folder, 1.0, ["it rains"])
        (entry,) = json.loads((folder / "index.json").read_text())
        (folder / "000.given.mp4").write_bytes(b"the first frame")
        entry |= {"given": "000.given.mp4", "task": "first_frame"}
        (folder / "index.json").write_text(json.dumps([entry]))
    html = write_report(run, now=LONG_AFTER).read_text()
    given = f"data:video/mp4;base64,{base64.b64encode(b'the first frame').decode()}"
    section = html[html.index('<section id="drawn">') : html.index('<section id="training">')]
    assert section.count("<video") == 2 and section.index(given) < section.index("it rains")
    assert "it rains<small>first frame</small>" in section
    ((entry,),) = [sample["entries"] for sample in page_data(html)["samples"]]
    assert entry["given"] == given
    words = re.findall(r"<span><i>(\w+)</i> (.*?)</span>", html)
    assert words == [
        ("given", "caption, first frame of the video"),
        ("drawn", "the rest of the video"),
    ]
    if CHROMIUM is not None:
        document, said = browse(run / "report.html", tmp_path / "profile")
        assert said == ""
        shown = re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
        assert shown.count('<div class="half">') == 2 and shown.count("<video") == 4


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_it(run_dir: Path, tmp_path: Path) -> None:
    page = write_report(run_dir, tmp_path / "page.html", now=LONG_AFTER)
    document, said = browse(page, tmp_path / "profile")
    assert said == ""
    titles = re.findall(r"<h3>(.*?)</h3>", document)
    assert titles == [
        "Training loss",
        "Training loss by noise level",
        "Loss over the noise level",
        "Validation loss",
        "Gradient norm",
        "Learning rate",
        "Throughput",
        "MFU",
        "Where a step's time goes",
    ]
    assert document.count('role="img"') == len(titles)
    assert "NaN" not in re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
    shown = re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
    assert shown.count("<video") == len(PROMPTS) and "step 2,000" in shown
    assert all(f"<figcaption>{prompt}" in shown for prompt in PROMPTS)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_a_run_that_has_hardly_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", total_steps=100, last_step=10, every=10, stopped=False)
    document, said = browse(write_report(run, now=START_S + 6), tmp_path / "profile")
    assert said == ""
    assert "No clips have been sampled" in document and "Training loss" in document
    (run / "metrics.jsonl").unlink()
    document, said = browse(write_report(run, now=START_S + 6), tmp_path / "profile")
    assert said == ""
    assert "No losses have been logged." in document
