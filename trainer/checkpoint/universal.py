"""DeepSpeed's universal checkpoints, to and from: a file for each tensor of each parameter.

    zero/NAME/fp32.pt         {"param": the whole parameter}
    zero/NAME/exp_avg.pt      the same of AdamW's moments, exp_avg_sq.pt as well
    zero/optimizer_state.pt   what DeepSpeed wants to know of the optimizer as a whole
    state.json                the position of the run, which only this project reads

Whole parameters are read and written one at a time; nothing is unpickled but tensors.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kinodit.trainer.checkpoint.commit import STATE_FILE
from kinodit.trainer.checkpoint.load import load_state
from kinodit.trainer.checkpoint.restricted import read_index
from kinodit.trainer.checkpoint.shards import read_shards
from kinodit.trainer.checkpoint.verify import one_line, verify
from kinodit.trainer.state import CheckpointError, TrainState

FOLDER = "zero"
STATE_NAMES = {"model": "fp32", "optim/exp_avg": "exp_avg", "optim/exp_avg_sq": "exp_avg_sq"}
"""Entries of ours -> files of theirs."""
OPTIMIZER_FILE = "optimizer_state.pt"


def export_universal(path: Path, out: Path) -> int:
    """Write the checkpoint at `path` as a universal one into the new folder `out`; its parameters.

    Averages have no place in a universal checkpoint and are left behind.

    Raises:
        CheckpointError: it is broken, was trained with another optimizer, or `out` exists.
    """
    problems = verify(path)
    if problems:
        raise CheckpointError(f"{path} is broken: {one_line(problems)}")
    sizes = read_index(path).state_dict_metadata
    state = load_state(path)
    names = [name.removeprefix("model/") for name in sizes if name.startswith("model/")]
    lacking = [f"{p}/{n}" for n in names for p in STATE_NAMES if f"{p}/{n}" not in sizes]
    if lacking:
        raise CheckpointError(
            f"{path} has no {lacking[0]}: a universal checkpoint holds AdamW's two moments of "
            "every parameter, and this run's optimizer keeps something else"
        )
    strange = [name for name in names if name in ("", ".", "..") or set(name) & set("/\\\0")]
    if strange:
        raise CheckpointError(
            f"{path} names a parameter {strange[0]!r}, which is no name of a folder: do not use "
            "this checkpoint, it may be an attempt to write elsewhere"
        )
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise CheckpointError(f"{out} exists: name a new folder") from error
    for name in names:
        entries = {
            f"{prefix}/{name}": torch.empty(
                sizes[f"{prefix}/{name}"].size, dtype=sizes[f"{prefix}/{name}"].properties.dtype
            )
            for prefix in STATE_NAMES
        }
        read_shards(path, entries, alone=True)
        folder = out / FOLDER / name
        folder.mkdir(parents=True)
        for prefix, file in STATE_NAMES.items():
            torch.save({"param": entries[f"{prefix}/{name}"]}, folder / f"{file}.pt")
    torch.save(_global_state(state), out / FOLDER / OPTIMIZER_FILE)
    (out / STATE_FILE).write_text(state.to_json() + "\n")
    return len(names)


def _global_state(state: TrainState) -> dict[str, Any]:
    """What DeepSpeed reads before any parameter: the count of updates, and nothing to override."""
    step = torch.tensor(float(state.num_updates))
    optimizer = {"state": {0: {"step": step}}, "param_groups": [{"params": [0], "step": step}]}
    return {
        "optimizer_state_dict": optimizer,
        "param_groups": optimizer["param_groups"],
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.4},
    }


def universal_state(path: Path, num_steps: int | None) -> TrainState:
    """The position of a universal checkpoint: what its state.json says, or `num_steps` updates.

    Raises:
        CheckpointError: neither is known.
    """
    file = path / STATE_FILE
    if file.is_file():
        return TrainState.from_json(file.read_text(errors="replace"), str(file))
    if num_steps is None:
        raise CheckpointError(
            f"{path} does not say how many steps it has behind it: tell it by --steps"
        )
    return TrainState(num_steps, 0, 0, "")


def universal_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, tensor) of every file of a universal checkpoint.

    Raises:
        CheckpointError: it is none, or a file is damaged or holds anything but tensors.
    """
    folder = path / FOLDER
    found = sorted(entry for entry in folder.glob("*") if entry.is_dir())
    if not found:
        raise CheckpointError(f"{path} is no universal checkpoint: it has no {FOLDER}/NAME folders")
    for entry in found:
        for prefix, file in STATE_NAMES.items():
            yield f"{prefix}/{entry.name}", _read(entry / f"{file}.pt")


def _read(file: Path) -> Tensor:
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{file} cannot be read as tensors ({str(error).splitlines()[0]})"
        ) from error
    tensor = found.get("param") if isinstance(found, dict) else found
    if not isinstance(tensor, Tensor):
        raise CheckpointError(f"{file} holds no tensor")
    return tensor
