"""Why a run is given up, each with an exit code of its own, for scripts and for who reads logs."""

from __future__ import annotations

from kinodit.models.errors import UserError

HUNG = 80
"""Exit code of a process whose rank made no progress. The watchdog ends it: nothing is raised."""


class DivergedError(UserError):
    """Steps stay bad although the run went back and passed over data."""

    exit_code = 81


class CorruptedError(UserError):
    """Replicas of the same parameters differ: some memory or device is at fault."""

    exit_code = 82


class CrashLoopError(UserError):
    """The run was started again and again and got no further."""

    exit_code = 83


class LockedError(UserError):
    """Another job is training in this run's folder."""

    exit_code = 84
