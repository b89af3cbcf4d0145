"""`train(config)`: build a run in the order a reader expects, then hand over to the loop."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from kinodit.data.encode import SampleEncoder
from kinodit.data.latents import check_encoders
from kinodit.data.manifest import Dataset
from kinodit.data.quarantine import Replacement
from kinodit.data.select import check_epochs, open_datasets, plan_spec
from kinodit.data.spec import PlanSpec
from kinodit.models.errors import ConfigError
from kinodit.trainer import checkpoint, faults
from kinodit.trainer.batches import BatchSource
from kinodit.trainer.certify.certificate import uncertified
from kinodit.trainer.config import (
    CONFIG_FILE,
    RunConfig,
    config_to_dict,
)
from kinodit.trainer.consumed import ConsumedLedger
from kinodit.trainer.drift import acceptance, facts
from kinodit.trainer.encoders import cost_model, fitted_encoders
from kinodit.trainer.engine.build import build_mesh
from kinodit.trainer.engine.refusals import check_wish
from kinodit.trainer.entry import count_start, farewell, is_over, lock_folder, open_run
from kinodit.trainer.events import append_event
from kinodit.trainer.gallery import Gallery
from kinodit.trainer.loop import Loop
from kinodit.trainer.parallel.mesh import Mesh, placement_warning
from kinodit.trainer.parallel.traffic import listening
from kinodit.trainer.peak import Peak
from kinodit.trainer.progress import Progress
from kinodit.trainer.quarantine import Quarantine
from kinodit.trainer.resilience import pulse
from kinodit.trainer.resilience.errors import DivergedError
from kinodit.trainer.resilience.goodput import Ledger, process_start_s
from kinodit.trainer.resilience.guard import Guard
from kinodit.trainer.resilience.rollback import RollBack, past_bad_data, roll_back
from kinodit.trainer.resilience.signals import (
    FINISHED_FILE,
    Request,
    Signals,
    requeue_marker,
    write_marker,
)
from kinodit.trainer.setup import (
    Parts,
    build_parts,
    engine_wish,
    master_dtype,
    outputs,
    task_mix,
)
from kinodit.trainer.sinks import Sinks, require_extras
from kinodit.trainer.split_encoders import split_encoders
from kinodit.trainer.state import TrainState
from kinodit.trainer.step import Step
from kinodit.trainer.streams import check_streams, not_exact, streamed
from kinodit.trainer.topology import Topology
from kinodit.trainer.validation import build_evaluator


def train(
    config: RunConfig,
    topology: Topology,
    device: torch.device,
    stream: TextIO,
    signals: Signals | None = None,
    groups: object | None = None,
) -> TrainState:
    """Train to the recipe's last step, from the last checkpoint in the run's folder if any.

    Progress goes to `stream` on rank 0. `signals` may end it earlier. Collective: every rank
    calls it, with its own topology and device, inside the run's process group. `groups`: the
    megatron-core `ProcessGroupCollection` of a program that has one, for engine.name=megatron.

    Raises:
        UserError: whatever in the recipe, the data or the run's folder the user has to change.
    """
    require_extras(config.log)
    check_wish(engine_wish(config, topology.world_size, device))
    armed = faults.arm_from_environment(topology.rank)
    mesh = build_mesh(
        config.parallel, config.engine, topology.world_size, topology.rank, device, groups
    )
    with ExitStack() as stack:
        mesh.from_main(lambda: lock_folder(config, topology, stack))
        stack.enter_context(listening(pulse.message))
        return _train(config, topology, mesh, stream, signals or Signals(), armed)


def _train(
    config: RunConfig,
    topology: Topology,
    mesh: Mesh,
    stream: TextIO,
    signals: Signals,
    armed: str,
) -> TrainState:
    """See `train`; the run's folder is this job's."""
    run_dir = config.run.folder
    resumed_from, leftovers = mesh.from_main(lambda: open_run(run_dir, config))
    marker = requeue_marker(run_dir, topology.job.id)
    if mesh.from_main(lambda: is_over(run_dir, config, marker)):
        assert resumed_from is not None
        if topology.is_main:
            print(f"{run_dir} is finished: all {config.run.steps} steps are done", file=stream)
        return checkpoint.load_state(resumed_from)
    start = mesh.from_main(lambda: count_start(config, topology, resumed_from))
    reports = run_dir / "stacks" / f"start-{start:04d}"
    limits = config.resilience.hang_s, config.run.deadline_s
    pulse.watch(topology.rank, topology.world_size, reports, *limits)
    signals.limit(topology.job.ends_at_s, config.resilience.save_margin_s)
    warning = mesh.from_main(lambda: certificate_warning(config, topology.world_size))
    check_streams(config)
    datasets = open_datasets(config.data)
    whole = fitted_encoders(config, run_dir, datasets, mesh)
    encoders = split_encoders(whole, config.modalities.shard_ranks, topology, mesh.device)
    check_encoders(config.data, encoders.fingerprints)
    spec = plan_spec(config.data, datasets, cost_model(config, encoders), config.run.seed)
    check_epochs(config.data, spec, config.run.steps)
    encoder = SampleEncoder(
        encoders,
        config.run.seed,
        config.objective.condition_dropout,
        latent_cache_mib=config.data.cache_mib,
        text_dropout=config.modalities.text.dropout,
    )
    placement = placement_warning(config.parallel, topology.ranks_per_node)
    armed_faults = armed and f"faults are armed: {armed}"
    streams = not_exact(streamed(config))
    warnings = tuple(filter(None, (*leftovers, warning, placement, streams, armed_faults)))
    setting = Setting(config, topology, mesh, datasets, spec, encoder, signals, marker, stream)
    began_s = process_start_s()
    while True:
        try:
            return _attempt(setting, resumed_from, warnings, began_s)
        except RollBack as error:
            cause = error
        began_s = time.time()
        resumed_from, warnings = _go_back(setting, cause), ()


@dataclass(frozen=True)
class Setting:
    """What stays when a run goes back to a checkpoint and builds everything else anew."""

    config: RunConfig
    topology: Topology
    mesh: Mesh
    datasets: dict[str, Dataset]
    spec: PlanSpec
    encoder: SampleEncoder
    signals: Signals
    marker: Path
    stream: TextIO


def _attempt(
    setting: Setting, resumed_from: Path | None, warnings: Sequence[str], began_s: float
) -> TrainState:
    """Train from a checkpoint, or from the start, as far as it goes. Collective.

    `began_s`: unix time at which the process started, or went back.

    Raises:
        RollBack: the run has to go back.
    """
    config, topology, mesh, spec = setting.config, setting.topology, setting.mesh, setting.spec
    run_dir, stream = config.run.folder, setting.stream
    upcycle = config.upcycle if resumed_from is None else None
    parts = build_parts(config, mesh, setting.encoder, upcycle)
    origin, notes = facts(config, topology.world_size, spec), list(warnings)
    state = TrainState(0, 0, 0, spec.fingerprint)
    if resumed_from is not None:
        state = _restore(config, parts, origin, state.plan, notes)
    position = state
    state = mesh.from_main(lambda: past_bad_data(run_dir, position))
    guard = Guard(config.resilience.guard, mesh, setting.signals, state.guard)
    source = BatchSource(
        setting.encoder,
        parts.pack_spec,
        config.engine.micro_batches,
        master_dtype(config),
        task_mix(config, setting.encoder, config.run.seed),
        mesh.pack if config.modalities.share_encoding else None,
    )
    with ExitStack() as stack:
        sinks = ledger = progress = None
        if topology.is_main:
            ledger = Ledger(run_dir, state.step, began_s)
            stack.callback(ledger.close)
            sinks = Sinks(
                run_dir,
                config.log,
                None,
                resumed_from is not None or state.data_offset > 0,
                config_to_dict(config),
                resume_step=state.step,
                world_size=topology.world_size,
            )
            stack.callback(sinks.close)
            sinks.event("resume" if resumed_from else "start", state.step, _headline(parts, spec))
            for said in notes:
                print(said, file=stream)
                sinks.event("warning", state.step, said)
            progress = Progress(stream, config.run.steps, start_step=state.step)
            stack.callback(progress.close)
        saver = checkpoint.Saver(run_dir, config.checkpoint, mesh, origin, config.run.deadline_s)
        stack.callback(saver.close)
        evaluate = build_evaluator(config, parts, setting.encoder.encoders, mesh)

        def tell(replaced: Replacement) -> None:
            assert sinks is not None and progress is not None
            sinks.event("quarantine", replaced.step, str(replaced))
            progress.note(str(replaced))

        steps = Quarantine(
            run_dir, mesh, config.data, setting.datasets, spec, state.data_step, tell
        )
        stack.callback(steps.close)
        consumed = ConsumedLedger(run_dir, mesh, state) if config.log.ledger else None
        if consumed is not None:
            stack.callback(consumed.close)
        state = Loop(
            config=config,
            model_config=parts.model_config,
            mesh=mesh,
            engine=parts.engine,
            emas=parts.emas,
            step=_step(config, parts),
            source=source,
            steps=steps,
            guard=guard,
            saver=saver,
            evaluate=evaluate,
            generate=(
                Gallery(config, parts, master_dtype(config)).at_step
                if config.sample.every_steps and config.sample.prompts
                else None
            ),
            sinks=sinks,
            ledger=ledger,
            consumed=consumed,
            progress=progress,
            peak=Peak(mesh.device, config.precision.compute_dtype),
        ).run(state)
        pulse.beat("end", slow=True)
        if sinks is not None:
            sinks.event("stop", state.step, farewell(guard.request, state))
            if state.step >= config.run.steps:
                write_marker(run_dir / FINISHED_FILE, state.step)
            elif guard.request is Request.REQUEUE:
                write_marker(setting.marker, state.step)
    return state


def _go_back(setting: Setting, cause: RollBack) -> Path | None:
    """Set aside what `cause` says is not to be trusted; the checkpoint to go on from. Collective.

    Raises:
        DivergedError: it was tried often enough.
    """
    run_dir = setting.config.run.folder

    def decide() -> Path | None:
        try:
            done = roll_back(run_dir, cause, setting.config.resilience.guard.max_rollbacks)
        except DivergedError as error:
            append_event(run_dir, "stop", cause.good_step, str(error))
            raise
        append_event(run_dir, "rollback", cause.good_step, done)
        print(done, file=setting.stream)
        checkpoints = checkpoint.find_checkpoints(run_dir)
        return checkpoints[-1] if checkpoints else None

    # The model that is left behind is full of reference cycles, and must make room for the next.
    gc.collect()
    return setting.mesh.from_main(decide)


def certificate_warning(config: RunConfig, world_size: int) -> str:
    """What to say of a layout without a certificate; "" if there is one. Rank 0 only.

    Raises:
        ConfigError: there is none, and the recipe requires one.
    """
    layout = uncertified(config, world_size)
    if not layout:
        return ""
    command = f'kinodit certify {config.run.folder / CONFIG_FILE} --layouts "{layout}"'
    if config.run.require_certificate:
        raise ConfigError(
            f"run.require_certificate=true, but nothing certifies the layout {layout}: run "
            f"`{command}` first"
        )
    return f"no certificate for the layout {layout} yet: `{command}` proves it in minutes"


def _restore(
    config: RunConfig, parts: Parts, origin: Mapping[str, Any], plan: str, notes: list[str]
) -> TrainState:
    """Load the newest good checkpoint into the engine and the averages; where the run goes on.

    `notes` takes a line for each broken one that was passed over, and for what is different.

    Raises:
        CheckpointError: none can be read, or the run is not what was saved.
    """
    tensors = checkpoint.collect(parts.engine, parts.emas)
    restored = checkpoint.restore(
        config.run.folder,
        tensors,
        parts.mesh,
        strict=config.checkpoint.strict,
        accept=acceptance(origin, plan, config.checkpoint.accept_drift, notes.append),
    )
    assert restored is not None, "a checkpoint was found before"
    notes += restored.broken
    checkpoint.put_back(parts.engine, parts.emas, tensors)
    parts.engine.set_num_steps(restored.state.num_updates)
    return restored.state


def _step(config: RunConfig, parts: Parts) -> Step:
    return Step(
        engine=parts.engine,
        objective=parts.objective,
        emas=list(parts.emas.values()),
        mesh=parts.mesh,
        modalities=outputs(parts.model_config),
        loss_weights=config.objective.loss_weights,
        seed=config.run.seed,
        max_grad_norm=config.optim.max_grad_norm,
    )


def _headline(parts: Parts, spec: PlanSpec) -> str:
    """One line that says what is being trained on what."""
    count = parts.engine.num_parameters
    sizes = ", ".join(
        f"{d.name}: {d.num_eligible} of {d.num_samples} samples" for d in spec.datasets
    )
    return f"{count / 1e6:.1f} M parameters; {sizes}; {parts.mesh.world_size} rank(s)"
