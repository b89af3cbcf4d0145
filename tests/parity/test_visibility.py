"""A changed token that a task hides changes no output, bit for bit, however deep the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kinodit.data.synthetic import task_pack
from kinodit.data.tasks import StreamTask, TaskConfig
from kinodit.models.diffusion.objective import RectifiedFlowConfig, build_objective
from kinodit.models.mmdit import MMDiT
from kinodit.models.tokens import TokenBatch
from tests.support.tasks import CONDITIONS, STREAMS, TASKS, av_model, may_see

EDIT = TaskConfig(
    streams={"video": StreamTask(references="clean"), "audio": StreamTask(use="absent")}
)
PICTURED = {
    "edit": EDIT,
    "edit, references first": replace(EDIT, one_way=True),
    "edit of a clip, its first frame too": replace(
        EDIT,
        streams={**EDIT.streams, "video": StreamTask(references="clean", given="prefix")},
        one_way=True,
    ),
    "edit without a look at the caption": replace(EDIT, hidden={"video": ["text"]}),
}
"""Tasks with reference pictures, which some of the others may not see."""
EVERY = {**TASKS, **PICTURED}
SLOTS = [1, 3]
OBJECTIVE = build_objective(RectifiedFlowConfig(prediction="velocity"))


def noised_pack(name: str, slots: list[int] = SLOTS) -> TokenBatch:
    batch = task_pack(0, slots, STREAMS, CONDITIONS, torch.float64, {name: EVERY[name]}, 0)
    return OBJECTIVE.corrupt(batch, 0).batch


def reach(sees: Tensor) -> Tensor:
    """[J, J] bool: which tokens an output depends on, through any number of blocks."""
    found = sees | torch.eye(len(sees), dtype=torch.bool)
    for _ in range(5):
        found = (found.double() @ found.double()) > 0
    return found


def outputs(model: MMDiT, batch: TokenBatch) -> dict[str, Tensor]:
    with torch.no_grad():
        found: dict[str, Tensor] = model(batch)
    return found


@pytest.fixture(scope="module")
def model() -> MMDiT:
    return av_model()


@pytest.mark.tasks
@pytest.mark.parametrize("name", EVERY)
def test_a_hidden_token_changes_no_output(model: MMDiT, name: str) -> None:
    batch = noised_pack(name)
    depends = reach(may_see(EVERY[name], batch))
    before = outputs(model, batch)
    starts = {}
    first = 0
    for stream, tokens in batch.modalities.items():
        starts[stream] = first
        first += tokens.num_tokens
    for stream, tokens in batch.modalities.items():
        for row in range(0, tokens.num_tokens, 1 + tokens.num_tokens // 12):
            latents = tokens.latents.clone()
            latents[row] += 1.0
            after = outputs(model, batch.with_latents({stream: latents}))
            for other, values in after.items():
                changed = (values != before[other]).any(-1)
                end = starts[other] + len(changed)
                allowed = depends[starts[other] : end, starts[stream] + row]
                assert torch.equal(changed, allowed), (stream, row, other)


@pytest.mark.tasks
@pytest.mark.parametrize("name", TASKS)
def test_packed_beside_other_tasks_a_sample_is_as_alone(model: MMDiT, name: str) -> None:
    alone = noised_pack(name, [1])
    others = [task for task in TASKS if task != name][:7]
    mixed = {name: TASKS[name]} | {other: TASKS[other] for other in others}
    # Slot 1 has the task that is second in the mix.
    order = dict(sorted(mixed.items(), key=lambda item: item[0] != others[0]))
    assert list(order)[1] == name
    batch = OBJECTIVE.corrupt(
        task_pack(0, [0, 1, 2, 3, 4, 5, 6, 7], STREAMS, CONDITIONS, torch.float64, order, 0), 0
    ).batch
    found, expected = outputs(model, batch), outputs(model, alone)
    for stream, values in expected.items():
        mine = found[stream][batch.modalities[stream].segment == 1]
        assert torch.allclose(mine, values, rtol=0, atol=1e-12), stream
