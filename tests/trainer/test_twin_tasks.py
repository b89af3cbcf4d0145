"""The twin of a recipe with tasks: all of them, in packs that mix them."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import torch

from kinodit.data import synthetic
from kinodit.data.synthetic import SECONDS_PER_FRAME
from kinodit.data.tasks import DrawnTask
from kinodit.trainer.certify import trace
from kinodit.trainer.certify.certificate import key_of
from kinodit.trainer.certify.twin import twin
from kinodit.trainer.config import RunConfig
from tests.support.tasks import MODEL, TASKS


def test_the_packs_of_a_recipe_with_tasks_mix_all_of_them() -> None:
    config = replace(RunConfig(), model=MODEL, tasks=TASKS)
    made = twin(config)
    assert ("tasks.blocks of video.block_s", 0.5, SECONDS_PER_FRAME) in made.shrunk
    with patch.object(synthetic, "DrawnTask", wraps=DrawnTask) as drawn:
        for step in range(made.num_steps):
            (batch,) = trace._batches(made, step, 0, 1, torch.float64, 1)
            assert batch.num_segments == 8
    assert {call.args[0] for call in drawn.call_args_list} == set(TASKS)


def test_a_certificate_is_for_the_tasks_of_its_recipe() -> None:
    config = replace(RunConfig(), model=MODEL, tasks=TASKS)
    fewer = {name: task for name, task in TASKS.items() if name != "blocks"}
    keys = {key_of(twin(replace(config, tasks=tasks))) for tasks in (TASKS, fewer, {})}
    assert len(keys) == 3
