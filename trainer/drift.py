"""What a checkpoint was made by, and what is different now.

The manifest records the recipe, the layout, the versions and digests of the code that decides
gradients. On a resume, what would change the loss curve is refused, and what would not is listed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kinodit.data.spec import PlanSpec
from kinodit.trainer.certify.certificate import sources
from kinodit.trainer.checkpoint import Accept, Manifest
from kinodit.trainer.config import (
    RunConfig,
    differences,
    may_change,
    redacted,
    with_later_keys,
)
from kinodit.trainer.environment import describe_environment
from kinodit.trainer.state import CheckpointError, TrainState


def facts(config: RunConfig, world_size: int, spec: PlanSpec | None = None) -> dict[str, Any]:
    """The sections of a manifest: config (without secrets), mesh, versions, code, plan.

    `spec`: of the data order, of which every part is recorded by name.
    """
    shards = config.parallel.resolve(world_size)[1]
    mesh = {"world_size": world_size, "dp_shard": shards}
    mesh |= {
        name: getattr(config.parallel, name) for name in ("dp_replicate", "cp", "ring", "tp", "ep")
    }
    versions = describe_environment(world_size)
    return {
        "config": redacted(config),
        "mesh": mesh,
        "versions": {name: versions[name] for name in ("kinodit", "torch", "python", "device")},
        "code": code_digests(),
        "plan": {} if spec is None else plan_parts(spec),
    }


def plan_parts(spec: PlanSpec) -> dict[str, Any]:
    """What a data order depends on, by name, and datasets by theirs: plain data, digests."""
    document = json.loads(json.dumps(spec.describe(), default=vars))
    document["datasets"] = {part.pop("name"): part for part in document["datasets"]}
    return dict(document)


def code_digests() -> dict[str, str]:
    """The first 16 digits of SHA-256 of every source that decides gradients, by its name."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in sources()}


def drift(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(what would change the loss curve, what is merely worth knowing), a phrase each."""
    refused: list[str] = []
    listed: list[str] = []
    before = with_later_keys(saved.get("config", {}), now["config"])
    for key, old, new in differences(before, now["config"]):
        # The name of a run is that of its folder, which may have been copied or moved.
        harmless = key == "run.name" or may_change(key)
        (listed if harmless else refused).append(f"{key}: was {old}, is {new}")
    for section in ("mesh", "versions"):
        changed = differences(saved.get(section, {}), now[section])
        listed += [f"{section} {key}: was {old}, is {new}" for key, old, new in changed]
    code = [key for key, _, _ in differences(saved.get("code", {}), now["code"])]
    if code:
        more = f" and {len(code) - 3} more" if len(code) > 3 else ""
        listed.append(f"code that decides gradients changed: {', '.join(code[:3])}{more}")
    return refused, listed


def _short(value: object) -> str:
    """A value of a plan as a message has it: digests by their first digits."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def acceptance(
    now: Mapping[str, Any], plan: str, accept_drift: bool, say: Callable[[str], None]
) -> Accept:
    """What `checkpoint.restore` asks about a checkpoint before it reads tensors.

    now:  facts of this run
    plan: fingerprint of its data plan
    say:  told what is different and was let pass
    """

    def accept(path: Path, state: TrainState, manifest: Manifest) -> TrainState:
        refused, listed = drift(manifest.facts, now)
        if state.plan != plan:
            before = manifest.facts.get("plan")
            parts = differences(before, now["plan"]) if before else []
            changed = [f"{key}: was {_short(old)}, is {_short(new)}" for key, old, new in parts]
            told = "; ".join(changed[:4]) or "shards, filters or encoders changed"
            refused.append(f"the data plan: was {state.plan[:12]}, is {plan[:12]} ({told})")
        if refused and not accept_drift:
            raise CheckpointError(
                f"{path} was trained otherwise ({'; '.join(refused)}): undo these changes, start "
                "a run of another name, or go on regardless with checkpoint.accept_drift=true"
            )
        for said in (*refused, *listed):
            say(f"resumed from {path.name} with a difference: {said}")
        return replace(state, plan=plan)

    return accept
