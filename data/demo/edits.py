"""Edits of pictures of the stamp theatre: by words, by an example, or an actor in another place.

An edit is a pure function of (seed, index), and exact: the picture follows from its references and
its caption alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from PIL import Image, ImageOps

from kinodit.data.demo.theatre import Scene, Theatre

Kind = Literal["words", "example", "subject"]
KINDS: tuple[Kind, ...] = ("words", "example", "subject")
FIRST_SCENE = 20_000_000
"""Scenes from here on are for edits; those of clips and images come before."""


def _grey(picture: Image.Image) -> Image.Image:
    return ImageOps.grayscale(picture).convert("RGB")


EDITS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "mirror it": ImageOps.mirror,
    "turn it upside down": ImageOps.flip,
    "make it grey": _grey,
    "invert its colours": ImageOps.invert,
}
"""Words of an edit -> what it does to an RGB picture."""


class Edit(NamedTuple):
    """references: pictures in their order, each with one of `captions`; edit: "" of a subject."""

    kind: Kind
    edit: str
    scene: Scene
    references: tuple[Image.Image, ...]
    captions: tuple[str, ...]
    picture: Image.Image
    caption: str


def make_edit(theatre: Theatre, number: int) -> Edit:
    """Edit `number`. Kinds take turns, and within each kind the edits.

    words:   one picture, and what is to be done with it
    example: a picture before and after an edit, and another one, with which the same is to be done
    subject: an actor before grey, named, who is to be over some place
    """
    turn, which = divmod(number, len(KINDS))
    words = list(EDITS)[turn % len(EDITS)]
    first = FIRST_SCENE + 2 * number
    scene, picture = theatre.scene(first), theatre.picture(theatre.scene(first), first)
    kind = KINDS[which]
    if kind == "words":
        return Edit(kind, words, scene, (picture,), ("",), EDITS[words](picture), words)
    if kind == "example":
        other = theatre.picture(theatre.scene(first + 1), first + 1)
        references = other, EDITS[words](other), picture
        return Edit(
            kind, words, scene, references, ("", "", ""), EDITS[words](picture), "do the same"
        )
    place = theatre.scenery[scene.background].phrase
    actor = theatre.stamps[scene.stamp].phrase
    portrait = theatre.portrait(scene)
    return Edit(kind, "", scene, (portrait,), (actor,), picture, f"the same over {place}")
