"""Faults on purpose, at named points: for tests of what a run survives.

Nothing is armed unless a test calls `arm`, or the environment says KINODIT_FAULTS; no recipe can
reach it, and a run that is armed says so. The variable holds faults separated by semicolons, each
an action and where it strikes:

    KINODIT_FAULTS="kill:rank=1,step=7; enospc:point=checkpoint:before-manifest; sleep:seconds=5"

    point    a name of POINTS (default: step:begin)
    rank     the rank that is struck (default: every one)
    step     optimizer steps done before, for points of a step; the saved step, for points of a
             checkpoint (default: any)
    after    how often it is let pass before (default: 0)
    times    how often at most, in one process (default: 1)
    once     a path without commas: the fault strikes whoever creates this file, so that it does
             not strike again after a restart
    seconds  how long `sleep` lasts (default: 3600)
    scale    by what `spike` multiplies (default: 1e4)

Actions that end or hold the process: kill, term, usr1, stop (SIGKILL, SIGTERM, SIGUSR1, SIGSTOP to
itself), sleep, hang (in C, with the interpreter's lock held). Actions that raise: raise, enospc.
Actions on tensors, at points that hand some over: nan, spike, flip (one bit of one element).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kinodit.models.errors import ConfigError

VARIABLE = "KINODIT_FAULTS"

POINTS: dict[str, str] = {
    "step:begin": "before a step's data is asked for",
    "step:micro-batch": "before each forward; gradients may be accumulated already",
    "step:gradients": "after the last backward; hands over the gradients",
    "step:before-update": "before the optimizer changes parameters",
    "step:end": "after the update and the averages; hands over the parameters",
    "checkpoint:begin": "a save was decided on",
    "checkpoint:before-folder": "before the temporary folder exists",
    "checkpoint:after-folder": "the temporary folder is empty",
    "checkpoint:before-copy": "before tensors are copied to the host (asynchronous saves)",
    "checkpoint:after-copy": "tensors are copied; training goes on (asynchronous saves)",
    "checkpoint:before-shards": "before this rank's tensors are written",
    "checkpoint:inside-shard": "within a file of tensors",
    "checkpoint:after-shards": "all ranks' tensors are written",
    "checkpoint:before-manifest": "hashes are gathered",
    "checkpoint:inside-manifest": "the manifest is half written",
    "checkpoint:after-manifest": "the manifest is in the temporary folder",
    "checkpoint:before-rename": "everything is on the disk under the temporary name",
    "checkpoint:after-rename": "the checkpoint has its name",
    "checkpoint:before-latest": "the parent folder is synced; `latest` names the one before",
    "checkpoint:after-latest": "`latest` names the new one",
    "checkpoint:before-prune": "before old checkpoints are removed",
    "checkpoint:inside-prune": "an old checkpoint has lost its name and not yet its files",
    "checkpoint:end": "the save is over; the ranks have not agreed on it yet",
}
"""Every point, and where it is. A name that is not here is refused, armed or reached."""

_SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
    "stop": signal.SIGSTOP,
}
_ON_TENSORS = ("nan", "spike", "flip")
ACTIONS = (*_SIGNALS, "sleep", "hang", "raise", "enospc", *_ON_TENSORS)

_READ: dict[str, Callable[[str], Any]] = {
    "point": str,
    "rank": int,
    "step": int,
    "after": int,
    "times": int,
    "once": str,
    "seconds": float,
    "scale": float,
}


class InjectedFault(RuntimeError):
    """Raised by the action `raise`."""


@dataclass
class Fault:
    """One fault; see the module's text. rank, step: None = any."""

    action: str
    point: str = "step:begin"
    rank: int | None = None
    step: int | None = None
    after: int = 0
    times: int = 1
    once: str = ""
    seconds: float = 3600.0
    scale: float = 1e4

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ConfigError(f"{VARIABLE}: action {self.action!r}: there is {', '.join(ACTIONS)}")
        if self.point not in POINTS:
            raise ConfigError(f"{VARIABLE}: point {self.point!r}: there is {', '.join(POINTS)}")


def parse_faults(text: str) -> list[Fault]:
    """Faults of the form that the module's text gives.

    Raises:
        ConfigError: an unknown action, point or key, or a value that is no number.
    """
    return [_parse(part.strip()) for part in text.split(";") if part.strip()]


def _parse(text: str) -> Fault:
    action, _, rest = text.partition(":")
    values: dict[str, Any] = {}
    for pair in filter(None, (pair.strip() for pair in rest.split(","))):
        key, _, value = pair.partition("=")
        if key not in _READ:
            raise ConfigError(f"{VARIABLE}: key {key!r} of {text!r}: there is {', '.join(_READ)}")
        try:
            values[key] = _READ[key](value)
        except ValueError:
            raise ConfigError(f"{VARIABLE}: {pair!r} of {text!r}: not a number") from None
    return Fault(action.strip(), **values)


_armed: list[Fault] = []
_rank = 0


def arm(faults: Sequence[Fault], rank: int = 0) -> None:
    """Let `faults` strike this process, which is rank `rank`; replaces those armed before."""
    global _rank
    _armed[:] = [replace(fault) for fault in faults]
    _rank = rank


def arm_from_environment(rank: int) -> str:
    """Arm what KINODIT_FAULTS says, if it is set; the variable's text, "" without.

    Raises:
        ConfigError: it cannot be read.
    """
    text = os.environ.get(VARIABLE, "")
    if text:
        arm(parse_faults(text), rank)
    return text


def disarm() -> None:
    """Let no fault strike any more."""
    _armed.clear()


Tensors = Callable[[], Mapping[str, Tensor]]
"""This rank's own parts, for actions that change them in place; called if one strikes."""


def reach(point: str, step: int, tensors: Tensors | None = None) -> None:
    """Say that this process is at `point`: armed faults strike here.

    Raises:
        InjectedFault, OSError: the actions `raise` and `enospc`.
    """
    if not _armed:
        return
    assert point in POINTS, point
    for fault in _armed:
        here = fault.point == point and fault.rank in (None, _rank) and fault.step in (None, step)
        if here and fault.after > 0:
            fault.after -= 1
        elif here and fault.times > 0 and _first(fault.once):
            fault.times -= 1
            _strike(fault, f"at {point} of step {step}", tensors)


def _first(path: str) -> bool:
    """Whether this process created the file at `path`; True without a path."""
    if not path:
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _strike(fault: Fault, where: str, tensors: Tensors | None) -> None:
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.action])
    elif fault.action == "sleep":
        time.sleep(fault.seconds)
    elif fault.action == "hang":
        # PyDLL keeps the interpreter's lock: no other thread of this process runs either.
        ctypes.PyDLL(None).pause()
    elif fault.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"injected {where}")
    elif fault.action == "raise":
        raise InjectedFault(f"injected {where}")
    else:
        assert tensors is not None, f"{fault.action} {where}: no tensors are handed over there"
        _spoil(fault, next(iter(tensors().values())))


@torch.no_grad()
def _spoil(fault: Fault, tensor: Tensor) -> None:
    """Change the first element of `tensor` (nan, flip), or all of it (spike), in place."""
    if fault.action == "spike":
        tensor.mul_(fault.scale)
        return
    first = tensor.view(-1)[:1]
    if fault.action == "nan":
        first.fill_(float("nan"))
        return
    # The least bit of the exponent: an error of a factor of two, as hardware makes it.
    mantissa_bits = {torch.float64: 52, torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    view = first.view(integers[first.element_size()])
    view.bitwise_xor_(1 << mantissa_bits[first.dtype])
