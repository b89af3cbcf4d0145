"""What a task is given and what it draws, in words, as the run's config.yaml has it.

The config is plain data of any kind of run: what does not fit is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAMES = {"audio": "sound", "image": "picture"}
"""What streams are called, where it is not their name."""


@dataclass(frozen=True)
class Told:
    """What is given and what is drawn, listed; empty where there is none or nothing is known."""

    given: str = ""
    drawn: str = ""


def told(config: Mapping[str, Any], task: str, *, stills: bool = False) -> Told:
    """Of one of the recipe's tasks; of "" from captions alone. stills: of pictures beside clips."""
    model, tasks = _mapping(config.get("model")), _mapping(config.get("tasks"))
    stills = stills or _mapping(config.get("data")).get("num_frames") == 1
    streams = _mapping(model.get("streams"))
    if not streams or (task and task not in tasks):
        return Told()
    settings = _mapping(tasks.get(task))
    has_image = "image" in streams
    given, drawn = [], []
    for name, facts in streams.items():
        is_text = _mapping(facts).get("output") is False
        if not is_text and not _is_there(str(name), stills, has_image):
            continue
        stream = _mapping(_mapping(settings.get("streams")).get(name))
        use = stream.get("use", "clean" if is_text else "target")
        references = stream.get("references")
        if use == "clean":
            given.append("caption" if is_text else NAMES.get(str(name), str(name)))
        elif use == "target":
            part, rest = _parts("picture" if stills else NAMES.get(str(name), str(name)), stream)
            if references == "clean":
                given.append("reference pictures")
            given += [part] if part else []
            drawn.append("a group of pictures" if references == "target" else rest)
    block_s = settings.get("block_s")
    in_blocks = isinstance(block_s, (int, float)) and block_s > 0 and drawn
    return Told(
        _listed(given), _listed(drawn) + (f" in blocks of {block_s:g} s" if in_blocks else "")
    )


def _is_there(name: str, stills: bool, has_image: bool) -> bool:
    """Whether clips, or stills, have a stream."""
    if stills:
        return name == ("image" if has_image else "video")
    return name != "image"


def _parts(name: str, stream: Mapping[str, Any]) -> tuple[str, str]:
    """What is given of a stream that is drawn ("": nothing), and what is drawn of it."""
    span = _span(stream.get("frames"))
    frames = "frame" if span == "1" else f"{span} frames"
    part = {
        "prefix": f"first {frames} of the {name}",
        "suffix": f"last {frames} of the {name}",
        "ends": f"first and last {frames} of the {name}",
        "every": f"one frame in {span} of the {name}",
        "random": f"{span} {'frame' if span == '1' else 'frames'} of the {name}, anywhere",
        "at": f"chosen frames of the {name}",
        "inside": f"a box of the {name}",
        "outside": f"the {name} around a box",
    }.get(str(stream.get("given")), "")
    return part, f"the rest of the {name}" if part else name


def _span(frames: Any) -> str:
    """[2, 4] as "2 to 4"."""
    if not isinstance(frames, (list, tuple)) or len(frames) != 2:
        return "1"
    least, most = frames
    return str(most) if least == most else f"{least} to {most}"


def _listed(items: list[str]) -> str:
    return ", ".join(dict.fromkeys(items))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
