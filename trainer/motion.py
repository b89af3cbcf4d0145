"""Does a model do what its prompt says? Directions named in prompts against directions measured.

The prompts are those of the demo set's stamp theatre, whose ground truth can be read back from
pixels: an honest number where no preference model or human rater is at hand.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kinodit.data.demo.measure import measure_direction
from kinodit.data.media import read_mp4
from kinodit.data.record import RecordMeta
from kinodit.models.errors import UserError
from kinodit.models.random import generator

DIRECTIONS = ("left", "right", "up", "down")
CHANCE = 1 / len(DIRECTIONS)
MOTION_FILE = "motion.json"


class MotionError(UserError):
    """There is nothing to make prompts of, or nothing to measure."""


@dataclass(frozen=True)
class MotionResult:
    """How many of the sampled clips move as their prompt says.

    confusion: named direction -> measured direction -> clips
    """

    num_clips: int
    num_right: int
    confusion: dict[str, dict[str, int]]

    @property
    def accuracy(self) -> float:
        """Share of clips that move in the direction named; chance is a quarter."""
        return self.num_right / self.num_clips

    def save(self, folder: Path) -> None:
        """Write motion.json."""
        document = {**asdict(self), "accuracy": self.accuracy, "chance": CHANCE}
        (folder / MOTION_FILE).write_text(json.dumps(document, indent=1))


def motion_prompts(metas: Sequence[RecordMeta], num_prompts: int, seed: int) -> list[str]:
    """Prompts of sprites, directions and backgrounds drawn independently, directions in turn.

    Most name a combination that no training clip shows. `metas` are records of the theatre.

    Raises:
        MotionError: none of the records is of a thing that moves in a direction.
    """
    moving = [meta.extra for meta in metas if meta.extra.get("action") == "move"]
    if not moving:
        raise MotionError(
            "no record says extra.action=move: directions are measured on the demo set, made by "
            "`kinodit data demo`"
        )
    sprites = sorted({extra["sprite"] for extra in moving})
    places = sorted({extra["background"] for extra in moving})
    source = generator(seed, "motion prompts")
    return [
        f"{sprites[source.integers(len(sprites))]} moves {DIRECTIONS[number % len(DIRECTIONS)]} "
        f"over {places[source.integers(len(places))]}"
        for number in range(num_prompts)
    ]


def named_direction(prompt: str) -> str | None:
    """The direction that a theatre prompt names, if it does."""
    words = prompt.split()
    named = [after for word, after in itertools.pairwise(words) if word == "moves"]
    return named[0] if named and named[0] in DIRECTIONS else None


def measure_gallery(folder: Path) -> MotionResult:
    """Compare every clip of a samples folder whose prompt names a direction.

    Raises:
        MotionError: no prompt in the folder names a direction.
    """
    entries = json.loads((folder / "index.json").read_text())
    counts: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        named = named_direction(entry["prompt"])
        if named is not None and entry["file"].endswith(".mp4"):
            video, _ = read_mp4(folder / entry["file"])
            counts[named, measure_direction(video)] += 1
    if not counts:
        raise MotionError(f"no prompt in {folder} names a direction ('... moves left ...')")
    confusion = {
        named: {shown: counts[named, shown] for shown in DIRECTIONS} for named in DIRECTIONS
    }
    right = sum(confusion[direction][direction] for direction in DIRECTIONS)
    return MotionResult(sum(counts.values()), right, confusion)
