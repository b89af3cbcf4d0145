"""A tiny dataset of real mp4 files and a recipe that trains on it in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from kinodit.data.media import write_mp4
from kinodit.data.pack import pack
from kinodit.models.random import generator

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220)}


SOUND_RATE = 8000


def write_clips(folder: Path, num_clips: int = 12, *, with_sound: bool = False) -> None:
    """Clips of a coloured square that moves left or right, with captions that say so.

    `with_sound`: and a tone, high for those that move right.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_clips):
        source = generator("clip", number)
        name = list(COLOURS)[number % 3]
        rightwards = bool(source.integers(2))
        video = np.full((12, 32, 32, 3), int(source.integers(90, 160)), dtype=np.uint8)
        row = int(source.integers(4, 16))
        for frame in range(12):
            column = 2 + 2 * (frame if rightwards else 11 - frame) // 2
            video[frame, row : row + 10, column : column + 10] = COLOURS[name]
        time = np.arange(12 * SOUND_RATE // 8, dtype=np.float32) / SOUND_RATE
        tone = 0.4 * np.sin(2 * np.pi * (800 if rightwards else 300) * time)
        sound = (tone[None].astype(np.float32), SOUND_RATE) if with_sound else None
        write_mp4(folder / f"clip{number:02d}.mp4", video, 8, sound)
        caption = f"a {name} square moves {'right' if rightwards else 'left'}"
        (folder / f"clip{number:02d}.txt").write_text(caption)


def write_dataset(root: Path, num_clips: int = 12) -> Path:
    """Pack `write_clips` into shards; the dataset's folder."""
    write_clips(root / "clips", num_clips)
    pack(root / "clips", root / "data")
    return root / "data"


def tiny_recipe(root: Path, dataset: Path, **sections: dict[str, object]) -> Path:
    """A recipe of a very small model on `dataset`; `sections` are merged over it."""
    recipe: dict[str, dict[str, object]] = {
        "run": {"name": "tiny", "out_dir": str(root / "runs"), "steps": 6},
        "modalities": {
            "video": {
                "codec": {
                    "name": "wavelet",
                    "temporal_levels": 1,
                    "spatial_levels": 2,
                    "first_frame_alone": False,
                },
                "patch": [1, 2, 2],
            },
            "text": {"encoder": {"name": "bytes"}},
        },
        "model": {"preset": "tiny", "width": 32, "num_heads": 2, "num_double_blocks": 1},
        "data": {
            "datasets": {"clips": {"path": str(dataset)}},
            "height": 16,
            "width": 16,
            "num_frames": 4,
            "fps": 8,
            "samples_per_step": 6,
            "packs_per_step": 3,
            "num_threads": 1,
        },
        "optim": {"lr": 1e-3},
        "ema": {"main": {"decay": 0.9}},
        "checkpoint": {"every_steps": 0},
        "log": {"every_steps": 1, "wandb": "off"},
    }
    for name, section in sections.items():
        recipe[name] = {**recipe.get(name, {}), **section}
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
