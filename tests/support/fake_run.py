"""A run folder as training leaves it, made from formulas: for tests of what reads one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kinodit.data.media import contact_sheet, write_mp4, write_png

START_S = 1_795_000_000.0
PROMPTS = (
    "a red kangaroo moves left over a beach",
    "a blue kite moves up over a forest",
    "a green tractor turns over a field of wheat",
    "a yellow umbrella grows over a city at night",
    "two white ducks move right over a lake",
    "a purple balloon shrinks over the mountains",
)
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
CANARY = "canary-5f2c81"


def train_row(step: int, every: int, rng: np.random.Generator) -> dict[str, Any]:
    """A row that looks like one of a real run: falling, noisy, slower at first."""
    progress = step / 2000
    level = 0.28 + 1.1 * math.exp(-progress * 5) + 0.12 * math.exp(-progress)
    bins = []
    for index in range(10):
        t = (index + 0.5) / 10
        floor = 0.25 + 1.6 * (t - 0.45) ** 2 + 0.35 * t
        loss = level * floor * 2.1 * float(rng.lognormal(0, 0.05))
        bins.append([index / 10, (index + 1) / 10, loss, int(rng.integers(40, 400))])
    loss = sum(b[2] * b[3] for b in bins) / sum(b[3] for b in bins)
    evaluated = step % 200 < every
    compute, wait = 0.41 * float(rng.lognormal(0, 0.03)), 0.012 * float(rng.lognormal(0, 0.6))
    encode = 0.055 * float(rng.lognormal(0, 0.05))
    save = 1.3 / every if evaluated else 0.0
    evaluate = 2.4 / every if evaluated else 0.0
    step_s = compute + wait + encode + save + evaluate + 0.006
    return {
        "kind": "train",
        "step": step,
        "time_s": START_S + 0.5 * step,
        "loss": loss,
        "loss/video": loss,
        "lr": 1e-3 * min(1.0, step / 100) * (0.5 + 0.5 * math.cos(min(progress, 1.0) * math.pi)),
        "grad_norm": (0.4 + 3 * math.exp(-progress * 9)) * float(rng.lognormal(0, 0.25)),
        "step_s": step_s,
        "data_wait_s": wait,
        "encode_s": encode,
        "compute_s": compute,
        "checkpoint_s": save,
        "eval_s": evaluate,
        "tokens": 4096 * every,
        "tokens_per_s": 4096 / step_s,
        "samples_per_s": 16 / step_s,
        "flops": 3.1e11,
        "mfu": 0.43 * compute / step_s * float(rng.lognormal(0, 0.01)),
        "memory_gib": 1.84,
        "noise_bins": {"video": bins},
    }


def validation_row(step: int, total: int) -> dict[str, Any]:
    level = 0.3 + 1.0 * math.exp(-5 * step / total)
    bins = {f"{t:g}": level * (0.4 + 2.4 * (t - 0.45) ** 2 + 0.4 * t) for t in LEVELS}
    mean = sum(bins.values()) / len(bins)
    return {
        "kind": "validation",
        "step": step,
        "time_s": START_S + 0.5 * step,
        "loss/video": mean,
        "loss_shuffled_captions/video": mean * (1.02 + 0.25 * step / total),
        "bins": {"video": bins},
    }


def clip(prompt_index: int, quality: float, size: int = 64, num_frames: int = 16) -> np.ndarray:
    """A coloured disc that moves over a gradient; noise gives way to it as `quality` grows."""
    rng = np.random.default_rng(prompt_index)
    hue = np.array(
        [
            [220, 60, 50],
            [60, 90, 220],
            [50, 160, 70],
            [230, 200, 50],
            [240, 240, 235],
            [150, 60, 190],
        ]
    )
    frames = np.empty((num_frames, size, size, 3))
    y, x = np.mgrid[:size, :size]
    for t in range(num_frames):
        sky = np.stack([150 + 60 * y / size, 180 - 40 * x / size, 210 - 110 * y / size], axis=-1)
        angle = 2 * math.pi * (t / num_frames + prompt_index / 6)
        cx, cy = size * (0.5 + 0.28 * math.cos(angle)), size * (0.5 + 0.28 * math.sin(angle))
        inside = ((x - cx) ** 2 + (y - cy) ** 2 < (size / 6) ** 2)[..., None]
        frames[t] = np.where(inside, hue[prompt_index % len(hue)], sky)
    noise = rng.normal(128, 70, frames.shape)
    return (quality * frames + (1 - quality) * noise).clip(0, 255).astype(np.uint8)


def add_samples(run_dir: Path, step: int, quality: float, prompts: Sequence[str] = PROMPTS) -> None:
    write_samples(run_dir / "samples" / f"step-{step:08d}", quality, prompts)


def write_samples(folder: Path, quality: float, prompts: Sequence[str]) -> None:
    """A folder of clips with their index, as every sampling command writes it."""
    entries = []
    videos = [clip(index, quality) for index in range(len(prompts))]
    for index, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
        write_mp4(folder / f"{index:03d}.mp4", video, 8.0)
        entries.append(
            {
                "prompt": prompt,
                "file": f"{index:03d}.mp4",
                "seed": index,
                "steps": 30,
                "guidance": 4.0,
                "fps": 8.0,
                "num_frames": len(video),
                "height": video.shape[1],
                "width": video.shape[2],
            }
        )
    write_png(folder / "sheet.png", contact_sheet(videos, prompts))
    (folder / "index.json").write_text(json.dumps(entries))


def add_evaluation(run_dir: Path, step: int) -> Path:
    """What `kinodit evaluate RUN --tasks all` leaves: two tasks and the captions."""
    folder = run_dir / "evaluation" / f"step-{step:08d}"
    write_samples(folder, 1.0, PROMPTS)
    for task in ("first_frame", "sound_of_video"):
        write_samples(folder / "tasks" / task, 1.0, PROMPTS[:3])
    losses = {
        task: {
            stream: {**{f"{t:g}": scale * (0.2 + (t - 0.45) ** 2) for t in LEVELS}, "mean": scale}
            for stream, scale in streams.items()
        }
        for task, streams in {
            "joint": {"video": 0.412, "audio": 0.231},
            "first_frame": {"video": 0.287},
            "sound_of_video": {"audio": 0.154},
        }.items()
    }
    embedded = {"embedded": 0.0412}
    halves = {"embedded": 0.0105}
    figures = {
        "step": step,
        "loss": losses,
        "num_samples": 64,
        **dict.fromkeys(("fid", "kid", "fvd", "fad"), embedded),
        **{f"{name}_of_halves": halves for name in ("fid", "kid", "fvd", "fad")},
        "truth": {"direction": 0.94, "direction_real": 1.0, "direction_chance": 0.25},
        "tasks": {
            "first_frame": {
                "num_samples": 64,
                "fvd": embedded,
                "fvd_of_halves": halves,
                "fill": {
                    "fill_error": 0.0812,
                    "copy_error": 0.1344,
                    "nearer_than_copy": 0.953,
                    "kept_error": 0.0,
                    "codec_error": 0.0,
                },
            },
            "sound_of_video": {
                "num_samples": 64,
                "fad": embedded,
                "fad_of_halves": halves,
                "synchrony": {
                    "lag_frames": 0.31,
                    "within_a_frame": 0.92,
                    "lag_frames_real": 0.07,
                    "within_a_frame_real": 1.0,
                    "lag_frames_chance": 2.76,
                    "within_a_frame_chance": 0.21,
                },
            },
            "example": {"num_samples": 0},
        },
    }
    (folder / "evaluation.json").write_text(json.dumps(figures))
    return folder


def make_run(
    run_dir: Path,
    *,
    total_steps: int = 2000,
    last_step: int | None = None,
    every: int = 10,
    sample_steps: Sequence[int] = (),
    prompts: Sequence[str] = PROMPTS,
    stopped: bool = True,
) -> Path:
    """Write the folder. `last_step` before `total_steps` and not `stopped`: it was interrupted."""
    rng = np.random.default_rng(0)
    last = total_steps if last_step is None else last_step
    run_dir.mkdir(parents=True)
    config = {
        "run": {"name": run_dir.name, "out_dir": "runs", "seed": 0, "steps": total_steps},
        "model": {"width": 256, "depth": 8, "num_heads": 8, "streams": {"video": {"width": 256}}},
        "data": {
            "datasets": {"stamps": {"path": "data/stamps", "weight": 1.0}},
            "token_budget": 4096,
        },
        "objective": {"name": "rectified_flow", "prediction": "x0", "shift": 1.0},
        "optim": {"lr": 0.001, "betas": [0.9, 0.95], "max_grad_norm": 1.0},
        "log": {"every_steps": every, "wandb": "offline", "wandb_api_key": CANARY},
    }
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {
        "kinodit": "0.1.0",
        "torch": "2.13.0+cpu",
        "python": "3.11.7",
        "system": "Linux x86_64",
        "device": "Example processor, 2 cores",
        "num_ranks": 2,
    }
    (run_dir / "environment.json").write_text(json.dumps(environment))
    with (run_dir / "metrics.jsonl").open("w") as metrics:
        for step in range(every, last + 1, every):
            metrics.write(json.dumps(train_row(step, every, rng)) + "\n")
            if step % max(total_steps // 10, every) == 0:
                metrics.write(json.dumps(validation_row(step, total_steps)) + "\n")
    events = [("start", 0, "8.4 M parameters; stamps: 2048 samples; 2 rank(s)")]
    for step in range(total_steps // 5, last + 1, total_steps // 5):
        events.append(("checkpoint", step, f"step-{step:08d}"))
        if step == 2 * (total_steps // 5):
            events.append(("resume", step, "8.4 M parameters; stamps: 2048 samples; 2 rank(s)"))
    for step in sample_steps:
        add_samples(run_dir, step, min(1.0, 0.15 + step / total_steps), prompts)
        events.append(("sample", step, f"{len(prompts)} clips"))
    if last > total_steps // 2:
        message = f"wandb is off for the rest of this run (401, api_key={CANARY})"
        events.append(("warning", total_steps // 2, message))
    events.sort(key=lambda event: event[1])
    if stopped:
        events.append(("stop", last, f"{16 * last} samples seen"))
    with (run_dir / "events.jsonl").open("w") as file:
        for kind, step, message in events:
            row = {"kind": "event", "time_s": START_S + 0.5 * step, "step": step}
            file.write(json.dumps(row | {"event": kind, "message": message}) + "\n")
    return run_dir
