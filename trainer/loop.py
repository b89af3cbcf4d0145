"""The training loop: steps, and what happens between them on a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from kinodit.models.mmdit import MMDiTConfig
from kinodit.trainer import checkpoint, faults
from kinodit.trainer.batches import BatchSource
from kinodit.trainer.config import RunConfig
from kinodit.trainer.consumed import ConsumedLedger
from kinodit.trainer.ema import Ema
from kinodit.trainer.engine.base import Engine
from kinodit.trainer.metrics import Row, Window, pack_flops
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.peak import Peak
from kinodit.trainer.progress import Progress
from kinodit.trainer.quarantine import Quarantine
from kinodit.trainer.resilience import pulse
from kinodit.trainer.resilience.checksum import check_replicas
from kinodit.trainer.resilience.goodput import Ledger
from kinodit.trainer.resilience.guard import Guard
from kinodit.trainer.resilience.rollback import RollBack, check_finite
from kinodit.trainer.resilience.signals import Request
from kinodit.trainer.sinks import Sinks
from kinodit.trainer.state import CheckpointError, TrainState
from kinodit.trainer.step import Gate, Step


@dataclass
class Loop:
    """Everything one run needs between its first and its last step.

    evaluate: step -> validation row; generate: step -> entries of a samples folder. Both are
    collective. Sinks, ledger and progress exist on rank 0 only.
    """

    config: RunConfig
    model_config: MMDiTConfig
    mesh: Mesh
    engine: Engine
    emas: Mapping[str, Ema]
    step: Step
    source: BatchSource
    steps: Quarantine
    guard: Guard
    saver: checkpoint.Saver
    evaluate: Callable[[int], Row] | None
    generate: Callable[[int], list[dict[str, object]]] | None
    sinks: Sinks | None
    ledger: Ledger | None
    consumed: ConsumedLedger | None
    progress: Progress | None
    peak: Peak

    def run(self, state: TrainState) -> TrainState:
        """Train from `state` to the recipe's last step; saves there.

        Ends earlier after `run.stop_after_steps`, or when the ranks agree on a request to stop.

        Raises:
            RollBack: the parameters cannot be trusted any more.
        """
        config = self.config
        end = config.run.steps
        if config.run.stop_after_steps:
            end = min(end, state.step + config.run.stop_after_steps)
        window = Window(self.step.modalities)
        saved = state.step
        if self.ledger is not None:
            self.ledger.begin()
        if self._owes_validation(state.step, end):
            self._validate(window, state.step)
        while state.step < end:
            window, state = self._one_step(window, state)
            done = state.step
            self._tell(self.saver.poll())
            saves = _due(done, config.checkpoint.every_steps, end)
            # What is saved is checked as well.
            if _due(done, config.resilience.checksum_every_steps, 0) and not saves:
                self._check_replicas(state)
            if self.guard.request is not Request.NONE and done < end:
                break
            if _due(done, config.eval.every_steps, end):
                self._validate(window, done)
            if self.generate is not None and _due(done, config.sample.every_steps, end):
                with window.clock.measure("eval"):
                    self._show(done)
            if saves:
                with window.clock.measure("checkpoint"):
                    self.save(state)
                saved = done
        with window.clock.measure("checkpoint"):
            if saved != state.step:
                self.save(state)
            self._finish(state)
        if window.num_steps:
            # Stopped between two rows: the steps since the last one are not to be lost.
            self._log(window, state)
        else:
            self._account(state.step, *window.spent())
        return state

    def _owes_validation(self, step: int, end: int) -> bool:
        """Whether the last start stopped before the validation that was due. Collective."""
        if not 0 < step < end or not _due(step, self.config.eval.every_steps, end):
            return False
        sinks = self.sinks
        return self.mesh.from_main(
            lambda: sinks is not None and not sinks.has_row("validation", step)
        )

    def _validate(self, window: Window, step: int) -> None:
        if self.evaluate is not None:
            with window.clock.measure("eval"):
                self._report(self.evaluate(step))

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Begin a checkpoint; it is there when this returns if `wait`, else soon. Collective."""
        pulse.beat("save", slow=True)
        tensors = checkpoint.collect(self.engine, self.emas)
        check_finite(tensors, state, self.mesh)
        if self.config.resilience.checksum_every_steps:
            check_replicas(tensors, self.mesh, state.step)
        self._tell(self.saver.save(state, tensors))
        if wait:
            self._tell(self.saver.drain())

    def _finish(self, state: TrainState) -> None:
        """Wait for the last checkpoint; it gets a second chance, since nothing comes after it.

        Raises:
            CheckpointError: on all ranks: it cannot be written.
        """
        pulse.beat("save", slow=True)
        self._tell(self.saver.drain())
        if self.saver.last is None or not self.saver.last.failure:
            return
        self.save(state, wait=True)
        if self.saver.last.failure:
            raise CheckpointError(f"the last steps are lost: {self.saver.last.failure}")

    def _gate(self, step: int) -> Gate:
        """Whether to update; not before what is being saved has been copied."""
        gate = self.guard.gate(step)

        def asked(losses: Tensor, grad_norm: Tensor) -> bool:
            self.saver.wait_for_copy()
            return gate(losses, grad_norm)

        return asked

    def _tell(self, outcomes: Sequence[checkpoint.Outcome]) -> None:
        """Log how saves ended."""
        for outcome in outcomes:
            said = [*outcome.notes]
            if outcome.failure:
                said.append(
                    f"{outcome.failure}; training goes on with the checkpoints that are there "
                    f"({self.saver.num_failed} failed so far)"
                )
            elif self.sinks is not None:
                self.sinks.event("checkpoint", outcome.step, outcome.path.name)
            for line in said:
                if self.sinks is not None:
                    self.sinks.event("warning", outcome.step, line)
                if self.progress is not None:
                    self.progress.note(line)

    def _one_step(self, window: Window, state: TrainState) -> tuple[Window, TrainState]:
        config, clock = self.config, window.clock
        pulse.step(state.step)
        faults.reach("step:begin", state.step)
        with clock.measure("data"):
            data = next(self.steps)
        # As in every collective of a step: who waits here waits for ranks that still compute.
        clock.move(self.steps.take_wait_s(), "data", "compute")
        assert data.step == state.data_step, "the loader and the trainer disagree about the step"
        with clock.measure("encode"):
            batches = self.source.batches(data)
        lr = self._lr(state.step)
        with clock.measure("compute"):
            result = self.step(state.step, batches, lr, self._gate(state.step))
        tokens = sum(batch.num_tokens for batch in batches)
        samples = sum(batch.num_segments for batch in batches)
        flops = sum(3 * pack_flops(self.model_config, batch) for batch in batches)
        if self.mesh.counts:
            window.add(result, tokens, samples, flops)
        else:
            window.add(result, 0, 0, 0.0)
        state = replace(
            state,
            step=state.step + 1,
            num_tokens=state.num_tokens + result.counts.num_tokens,
            num_samples=state.num_samples + result.counts.num_samples,
            guard=self.guard.state,
        )
        if self.consumed is not None:
            self.consumed.add(state.step - 1, data)
        if not result.updated and self.sinks is not None:
            self.sinks.event("skip", state.step, f"no update, since {self.guard.reason}")
        try:
            self.guard.check(state)
        except RollBack:
            self._account(state.step, *window.spent())
            raise
        if self.progress is not None:
            self.progress.step(state.step)
        if not _due(state.step, config.log.every_steps, config.run.steps):
            return window, state
        self._log(window, state)
        return window.next(), state

    def _log(self, window: Window, state: TrainState) -> None:
        """Report the row of `window`, whose last step is done. Collective."""
        lr, weights = self._lr(state.step - 1), self.config.objective.loss_weights
        wait_s = self.guard.take_wait_s()
        elapsed_s, seconds = window.spent()
        row = window.row(state.step, lr, self.mesh, self.peak.flops_s(), weights, wait_s)
        self._account(state.step, elapsed_s, _with_data_of_slowest(seconds, row, window.num_steps))
        if self.ledger is not None:
            row["goodput"] = self.ledger.goodput.share
        if self.steps.fetched_per_used is not None:
            row["fetched_per_used"] = self.steps.fetched_per_used
        self._report(row)

    def _lr(self, step: int) -> float:
        config = self.config
        return config.optim.lr * config.schedule.factor(step, config.run.steps)

    def _check_replicas(self, state: TrainState) -> None:
        tensors = checkpoint.collect(self.engine, self.emas)
        check_replicas(tensors, self.mesh, state.step)

    def _account(self, step: int, elapsed_s: float, seconds: Mapping[str, float]) -> None:
        """Write down what the time of a window was spent on, whose last step is done."""
        if self.ledger is not None:
            self.ledger.add(step, elapsed_s, seconds)

    def _report(self, row: Row) -> None:
        if self.sinks is not None:
            self.sinks.metrics(row)
        if self.progress is not None:
            self.progress.metrics(row)

    def _show(self, step: int) -> None:
        assert self.generate is not None
        entries = self.generate(step)
        if self.sinks is not None:
            self.sinks.media(step, entries)
            self.sinks.event("sample", step, f"{len(entries)} clips")


def _with_data_of_slowest(
    seconds: Mapping[str, float], row: Row, num_steps: int
) -> dict[str, float]:
    """This rank's seconds where it waited for samples as long as the rank that waited longest.

    By so much its collectives waited for that rank.
    """
    own_s, compute_s = seconds.get("data", 0.0), seconds.get("compute", 0.0)
    longest_s = num_steps * float(cast(float, row["data_wait_s"]))
    more_s = min(max(0.0, longest_s - own_s), compute_s)
    return {**seconds, "data": own_s + more_s, "compute": compute_s - more_s}


def _due(done: int, every: int, end: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after `done`."""
    return every > 0 and (done % every == 0 or done == end)
