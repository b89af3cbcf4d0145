"""What took the place of bad samples: agreed on by all ranks, written down, held to its quotas."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from kinodit.data.config import DataConfig
from kinodit.data.loader import Loader, StepData
from kinodit.data.manifest import Dataset
from kinodit.data.quarantine import LEDGER_FILE, QuarantineError, Quotas, Replacement
from kinodit.data.samples import longest_s
from kinodit.data.shared_media import SharedMedia, shared_folder
from kinodit.data.spec import PlanSpec
from kinodit.trainer.jsonl import cut_torn_line, read_rows
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.resilience import pulse


def read_ledger(run_dir: Path, plan: str) -> dict[tuple[int, int], Replacement]:
    """(step, slot) of the data plan -> what took that place, of all starts of the run so far.

    plan: fingerprint of the plan; lines of other plans (a validation set's, or one that the run
        had before its data changed) are left out

    Raises:
        QuarantineError: a line is not one that was written there. A last line that a kill cut short
            is of a step that was never used, and left out.
    """
    path = run_dir / LEDGER_FILE
    if not path.is_file():
        return {}
    rows = list(read_rows(path))
    if rows and rows[-1] is None:
        rows.pop()
    mine = [row for row in rows if row is None or row.pop("plan", None) == plan]
    found = [Replacement.parse(row) for row in mine]
    return {(item.step, item.slot): item for item in found}


class Quarantine:
    """The steps of a loader, with the same substitutes on all ranks, after any restart, too.

    A damaged sample fails on every rank that loads it. One that took too long may fail on one of
    the ranks that share a pack only: then all of them take its substitute. Nothing is trained on
    before rank 0 has written it down. Collective: every rank takes every step.
    """

    def __init__(
        self,
        run_dir: Path,
        mesh: Mesh,
        config: DataConfig,
        datasets: Mapping[str, Dataset],
        spec: PlanSpec,
        start_step: int = 0,
        tell: Callable[[Replacement], None] = lambda _: None,
    ) -> None:
        """A loader of this rank's packs, from `start_step` of the plan on.

        tell: is given what is newly replaced, on rank 0
        """
        self._path = run_dir / LEDGER_FILE
        self._mesh = mesh
        self._plan = spec.fingerprint
        self._is_on = config.on_error == "substitute"
        settled = mesh.from_main(lambda: read_ledger(run_dir, spec.fingerprint))
        self._quotas = Quotas(config.quarantine, datasets, config.samples_per_step)
        self._quotas.count(settled.values())
        self._written = set(settled)
        self._tell = tell
        self._waited_s = 0.0
        self._longest_s = longest_s(config)
        place = mesh.dp_index, mesh.dp_size
        self._loader = Loader(
            spec, datasets, config, *place, start_step, settled=settled,
            shared=_shared(run_dir, mesh, spec), alive=lambda: pulse.beat("data"),
            at_work=pulse.at_work(),
        )  # fmt: skip

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepData:
        """The next step, as every rank that has its packs sees it. Collective.

        Raises:
            LoadError: a sample, or a substitute that another rank uses, cannot be loaded here.
            QuarantineError: on all ranks: more was replaced than `data.quarantine` allows.
        """
        data = next(self._loader)
        if not self._is_on:
            return data
        # Storage and decoders have limits of their own, after which the run goes on or ends with
        # the reason; ranks that have their samples wait for those that do not.
        pulse.beat("data", more_s=self._longest_s)
        start_s = time.perf_counter()
        is_replaced = self._mesh.any(bool(data.replaced))
        self._waited_s += time.perf_counter() - start_s
        return self._settled(data) if is_replaced else data

    def take_wait_s(self) -> float:
        """Seconds since the last call in which this rank had its samples, and waited for others."""
        taken, self._waited_s = self._waited_s, 0.0
        return taken

    def close(self) -> None:
        """Stops the loader."""
        self._loader.close()

    @property
    def fetched_per_used(self) -> float | None:
        """Bytes that this rank fetched for each byte of a sample; None without remote shards."""
        return self._loader.traffic.fetched_per_used

    @property
    def num_bad(self) -> int:
        """Different samples of the run that were bad, over all ranks."""
        return self._quotas.num_bad

    def _settled(self, data: StepData) -> StepData:
        while True:
            everywhere = self._mesh.gather_objects(data.replaced)
            chosen: dict[int, Replacement] = {}
            found = [item for part in everywhere for item in part]
            for item in sorted(found, key=lambda item: (len(item.faults), item.used)):
                chosen[item.slot] = item
            settled = self._loader.settle(data, chosen)
            if not self._mesh.any(settled.replaced != data.replaced):
                break
            data = settled
        self._account([chosen[slot] for slot in sorted(chosen)])
        return settled

    def _account(self, replaced: list[Replacement]) -> None:
        self._quotas.count(replaced)
        new = [item for item in replaced if (item.step, item.slot) not in self._written]
        self._written |= {(item.step, item.slot) for item in new}

        def write() -> None:
            if new:
                _append(self._path, [{"plan": self._plan, **item.to_json()} for item in new])
            for item in new:
                self._tell(item)

        self._mesh.from_main(write)
        self._quotas.check(replaced)


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        with path.open("a+b") as file:
            cut_torn_line(file)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise QuarantineError(
            f"{path} cannot be written ({error.strerror}): what replaces a bad sample must be on "
            "disk before it is trained on"
        ) from error


def _shared(run_dir: Path, mesh: Mesh, spec: PlanSpec) -> SharedMedia | None:
    """Where the ranks of a pack that are on one node share what they decode. Collective."""
    if mesh.world_size == mesh.dp_size:
        return None
    folder = shared_folder(str(run_dir.absolute()), spec.fingerprint, mesh.dp_index)
    shared = SharedMedia(folder)
    shared.clear()
    mesh.barrier()
    return shared
