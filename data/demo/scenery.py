"""The backgrounds of the stamp theatre: crops of real photographs, or plain colours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from kinodit.data.demo.packages import package_file

# phrase, package and file, box (left, top, right, bottom as shares), tint of a grey photograph
_PHOTOS = (
    ("a brick wall", ("skimage", "data", "brick.png"), (0, 0, 1, 1), (214, 118, 92), "CC0-1.0"),
    ("a lawn", ("skimage", "data", "grass.png"), (0, 0, 1, 1), (128, 190, 84), "CC0-1.0"),
    ("a beach", ("skimage", "data", "gravel.png"), (0, 0, 1, 1), (236, 204, 150), "CC0-1.0"),
    ("the moon", ("skimage", "data", "moon.png"), (0, 0, 1, 1), None, "not stated"),
    ("a starry sky", ("skimage", "data", "hubble_deep_field.jpg"), (0, 0, 1, 1), None, "NASA"),
    ("a wooden table", ("skimage", "data", "coffee.png"), (0.7, 0.42, 1, 1), None, "CC0-1.0"),
    ("a launch pad", ("skimage", "data", "rocket.jpg"), (0, 0.1, 1, 1), None, "public domain"),
    (
        "a temple garden",
        ("sklearn", "datasets", "images", "china.jpg"),
        (0, 0.1, 1, 1),
        None,
        "CC-BY-2.0",
    ),
    (
        "a big flower",
        ("sklearn", "datasets", "images", "flower.jpg"),
        (0, 0, 1, 1),
        None,
        "CC-BY-2.0",
    ),
)
_COLOURS = (
    ("blue", (70, 120, 210)),
    ("green", (84, 168, 96)),
    ("yellow", (240, 208, 88)),
    ("pink", (240, 160, 190)),
    ("grey", (150, 150, 150)),
    ("white", (240, 240, 240)),
    ("purple", (140, 96, 190)),
    ("brown", (140, 100, 70)),
)


@dataclass(frozen=True)
class Scenery:
    """A background and what stands after "over" in a caption."""

    phrase: str
    picture: Image.Image
    source: str
    licence: str

    @property
    def is_plain(self) -> bool:
        """Whether it is one colour."""
        return self.source == ""


def photo_scenery() -> list[Scenery]:
    """The photographs; grey ones are tinted (gravel becomes a beach)."""
    found = []
    for phrase, parts, (left, top, right, bottom), tint, licence in _PHOTOS:
        with Image.open(package_file(*parts)) as image:
            photo = image.convert("RGB")
        width, height = photo.size
        photo = photo.crop(
            (round(left * width), round(top * height), round(right * width), round(bottom * height))
        )
        if tint is not None:
            grey = np.asarray(photo, dtype=np.float32)
            grey = grey / max(1.0, float(np.percentile(grey, 95)))
            tinted = np.clip(grey * np.array(tint, np.float32), 0, 255)
            photo = Image.fromarray(tinted.astype(np.uint8))
        package = "scikit-image" if parts[0] == "skimage" else "scikit-learn"
        found.append(Scenery(phrase, photo, f"{parts[-1]} ({package})", licence))
    return found


def plain_scenery() -> list[Scenery]:
    """Plain colours."""
    return [
        Scenery(f"a {name} background", Image.new("RGB", (8, 8), colour), "", "")
        for name, colour in _COLOURS
    ]


def backdrop(scenery: Scenery, size: int, draw: np.random.Generator) -> Image.Image:
    """A square RGB picture of `size` pixels: a crop, softened and dimmed by chance.

    A photograph is always dimmed or softened a little, so that the actor stands out.
    """
    share, x, y, blur, dim = draw.random(5).tolist()
    picture = scenery.picture
    side = round(min(picture.size) * (0.55 + 0.45 * share))
    left, top = round(x * (picture.width - side)), round(y * (picture.height - side))
    picture = picture.crop((left, top, left + side, top + side))
    picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    if scenery.is_plain:
        return ImageEnhance.Brightness(picture).enhance(0.85 + 0.3 * dim)
    picture = picture.filter(ImageFilter.GaussianBlur(blur * size / 40))
    return ImageEnhance.Brightness(picture).enhance(0.6 + 0.35 * dim)
