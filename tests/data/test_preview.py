"""The contact sheet: whole in one file, everything a sample has on it, nothing executed from it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kinodit.data.manifest import Dataset
from kinodit.data.preview import PreviewError, preview
from kinodit.data.record import Caption, Record, RecordMeta
from tests.data.clips import (
    clip_bytes,
    image_bytes,
    sound_bytes,
    sound_record,
    video_record,
    write_dataset,
)


def page_of(dataset: Dataset, tmp_path: Path, **options: Any) -> str:
    out = tmp_path / "page.html"
    preview(dataset, out, **options)
    return out.read_text(encoding="utf-8")


def cards(page: str) -> dict[str, str]:
    """HTML of each card by the key it shows."""
    found = re.findall(r"<article.*?</article>", page, flags=re.DOTALL)
    return {re.search(r"<summary>(.*?)</summary>", card).group(1): card for card in found}  # type: ignore[union-attr]


@pytest.fixture
def mixed(tmp_path: Path) -> Dataset:
    clip = clip_bytes(24, 12, onset=8000)
    quiet = clip_bytes(12, 12)
    return write_dataset(
        tmp_path / "mixed",
        [
            video_record(
                "clip", clip, 24, 12.0, has_audio=True, sample_rate=16_000,
                scores={"motion": 0.25}, extra={"shot": "wide"}, licence="CC0-1.0",
            ),
            video_record("nothing-said", quiet, 12, 12.0, captions=()),
            video_record("broken", b"no clip", 12, 12.0),
            Record(
                "image", RecordMeta(id="i", modality="image", width=64, height=48,
                captions=(Caption("a <b>bold</b> & \"quoted\" one"), Caption("zwei", "de"))),
                {"png": image_bytes("png")},
            ),
            sound_record("beep", sound_bytes(1.0, 8000), 1.0),
            sound_record("hush", sound_bytes(1.0, 16_000), 1.0),
        ],
    )  # fmt: skip


def test_every_sample_is_a_card_with_what_it_has(mixed: Dataset, tmp_path: Path) -> None:
    found = cards(page_of(mixed, tmp_path))
    assert list(found) == ["clip", "nothing-said", "broken", "image", "beep", "hush"]
    assert "data:image/jpeg;base64," in found["clip"]
    assert 'data-medium="data:video/mp4;base64,' in found["clip"]
    assert "<path d=" in found["clip"]
    assert "motion</dt><dd>0.25" in found["clip"]
    assert "shot</dt><dd>wide" in found["clip"]
    assert "<audio controls" in found["beep"]
    assert "<path d=" not in found["image"]


def test_flags_say_what_is_odd(mixed: Dataset, tmp_path: Path) -> None:
    page = page_of(mixed, tmp_path)
    flags = {
        key: re.search(r'data-flags="(.*?)"', card).group(1).split("|")  # type: ignore[union-attr]
        for key, card in cards(page).items()
    }
    assert flags["clip"] == [""]
    assert flags["nothing-said"] == ["no caption"]
    assert flags["broken"] == ["does not decode"]
    assert flags["hush"] == ["no caption", "silent"]
    assert flags["beep"] == ["no caption"]
    assert "sample &#39;broken&#39;" in cards(page)["broken"]
    for flag in ("no caption", "does not decode", "silent"):
        assert f'data-flag="{flag}"' in page


def test_the_wave_starts_where_the_sound_does(mixed: Dataset, tmp_path: Path) -> None:
    card = cards(page_of(mixed, tmp_path))["beep"]
    tops = [float(top) for top in re.findall(r"M\d+ (-?[\d.]+)h", card)]
    loud = [column for column, top in enumerate(tops) if top < -0.1]
    assert len(tops) == 240
    assert abs(loud[0] - 120) <= 1


def test_captions_are_text_never_markup(mixed: Dataset, tmp_path: Path) -> None:
    page = page_of(mixed, tmp_path)
    assert "<b>bold" not in page
    assert "a &lt;b&gt;bold&lt;/b&gt; &amp; &#34;quoted&#34; one" in page
    assert "de · " in cards(page)["image"]


def test_the_page_is_one_file_without_network(mixed: Dataset, tmp_path: Path) -> None:
    page = page_of(mixed, tmp_path)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:|//)""", page)
    open_tags: list[str] = []

    class Balance(HTMLParser):
        def handle_starttag(self, tag: str, attributes: object) -> None:
            if tag not in ("meta", "img", "input", "br"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attributes: object) -> None:
            assert tag == "path"

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Balance().feed(page)
    assert open_tags == []


def test_samples_are_drawn_by_seed_without_replacement(tmp_path: Path) -> None:
    records = [
        Record(f"i-{n}", RecordMeta(id="i", modality="image", width=64, height=48),
               {"png": image_bytes("png", number=n)})
        for n in range(20)
    ]  # fmt: skip
    dataset = write_dataset(tmp_path / "d", records)
    first = list(cards(page_of(dataset, tmp_path, num_samples=8, seed=1)))
    assert len(set(first)) == 8
    assert first == list(cards(page_of(dataset, tmp_path, num_samples=8, seed=1)))
    assert first != list(cards(page_of(dataset, tmp_path, num_samples=8, seed=2)))
    assert len(cards(page_of(dataset, tmp_path, num_samples=100))) == 20


def test_a_damaged_sample_is_shown_as_such(mixed: Dataset, tmp_path: Path) -> None:
    path, offset, _ = mixed.locate(3)
    data = bytearray(path.read_bytes())
    data[offset + 700] ^= 1
    path.write_bytes(data)
    page = page_of(Dataset(mixed.directory), tmp_path)
    assert 'data-flags="unreadable"' in page
    assert len(re.findall("<article", page)) == 6


def test_wrong_input(mixed: Dataset, tmp_path: Path) -> None:
    with pytest.raises(PreviewError, match="num-samples is 0"):
        preview(mixed, tmp_path / "x.html", num_samples=0)
    with pytest.raises(PreviewError, match="cannot be written"):
        preview(mixed, tmp_path / "nowhere" / "x.html", num_samples=1)
