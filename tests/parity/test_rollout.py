"""Block after block: remembered keys give what computing everything again gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kinodit.data.synthetic import task_pack
from kinodit.data.tasks import TaskConfig
from kinodit.models.attention import attend
from kinodit.models.diffusion.field import velocity_field
from kinodit.models.diffusion.guidance import GuidanceConfig, guided
from kinodit.models.diffusion.objective import RectifiedFlowConfig, build_objective
from kinodit.models.diffusion.rollout import Blocks, roll_out, stages
from kinodit.models.diffusion.samplers import VelocityFn, sample, time_grid
from kinodit.models.mmdit import MMDiT
from kinodit.models.random import generator, normal
from kinodit.models.tokens import Role, TokenBatch
from tests.support.tasks import CONDITIONS, STREAMS, TASKS, av_model

OBJECTIVE = build_objective(RectifiedFlowConfig(prediction="velocity"))
BLOCKWISE = [name for name, task in TASKS.items() if task.block_s]
TIMES = time_grid(3, 2.0)


@pytest.fixture(scope="module")
def model() -> MMDiT:
    return av_model()


def batch_of(task: TaskConfig, slot: int = 4) -> TokenBatch:
    """Slot 4 has three frames, slot 5 four, and no sound."""
    return task_pack(0, [slot], STREAMS, CONDITIONS, torch.float64, {"task": task}, 0)


def noise_of(batch: TokenBatch) -> dict[str, Tensor]:
    return {
        name: normal(generator("rollout", name), tokens.latents.shape).double()
        for name, tokens in batch.modalities.items()
        if bool((tokens.role == int(Role.NOISED)).any())
    }


def alone(velocities: Sequence[VelocityFn], batch: TokenBatch) -> VelocityFn:
    (velocity,) = velocities
    return velocity


def drawn(batch: TokenBatch, latents: object) -> dict[str, Tensor]:
    assert isinstance(latents, dict)
    return {
        name: latents[name][tokens.role == int(Role.NOISED)]
        for name, tokens in batch.modalities.items()
        if bool(tokens.weight.any())
    }


@torch.no_grad()
def rolled(model: MMDiT, batch: TokenBatch, *, remembers: bool) -> tuple[dict[str, Tensor], Blocks]:
    blocks = Blocks(model, OBJECTIVE, batch, model if remembers else None)
    latents = roll_out([blocks], alone, noise_of(batch), TIMES, "euler")
    return drawn(batch, dict(latents)), blocks


@pytest.mark.parametrize("name", BLOCKWISE)
def test_remembered_keys_give_what_computing_again_gives(model: MMDiT, name: str) -> None:
    batch = batch_of(TASKS[name])
    assert len(stages(batch)) >= 2
    again, _ = rolled(model, batch, remembers=False)
    remembered, blocks = rolled(model, batch, remembers=True)
    assert blocks.num_bytes > 0
    assert model.attend is attend
    for stream, latents in again.items():
        assert (remembered[stream] - latents).abs().max() < 1e-12 * latents.abs().max(), stream


@torch.no_grad()
def test_a_block_is_what_the_trained_mask_gives_of_the_blocks_before_it(model: MMDiT) -> None:
    """The whole batch at once, with what was drawn in clean places, has the same velocity."""
    batch = batch_of(TASKS["blocks"])
    blocks = Blocks(model, OBJECTIVE, batch, model)
    noise = noise_of(batch)
    for index in range(len(blocks.stages)):
        part = blocks.begin(index)
        start = {n: x[part.rows[n]] for n, x in noise.items()}
        here = part.velocity(start, 0.7)
        seen = batch.with_latents({n: blocks.latents[n].clone() for n in noise})
        whole = {n: blocks.latents[n].clone() for n in noise}
        for n, x in start.items():
            whole[n][part.rows[n]] = x
        everywhere = velocity_field(model, OBJECTIVE, seen)(whole, 0.7)
        for n, x in here.items():
            assert torch.allclose(everywhere[n][part.rows[n]], x, rtol=0, atol=1e-12)
        blocks.settle(part, sample(part.velocity, start, TIMES))
        clean = {n: t.role == int(Role.CLEAN) for n, t in batch.modalities.items()}
        # What was drawn is in the clean copies, and there are none of the last block.
        for n in noise:
            own = batch.modalities[n].position[part.rows[n]]
            copied = [
                row
                for row in clean[n].nonzero().squeeze(1).tolist()
                if (own == batch.modalities[n].position[row]).all(-1).any()
            ]
            last = index == len(blocks.stages) - 1
            assert len(copied) == (0 if last else len(own))
            assert torch.equal(
                blocks.latents[n][copied], blocks.latents[n][part.rows[n]][: len(copied)]
            )


def test_a_bounded_context_bounds_the_memory(model: MMDiT) -> None:
    def kept(task: TaskConfig) -> list[int]:
        batch = batch_of(task, 5)
        blocks = Blocks(model, OBJECTIVE, batch, model)
        sizes = []
        with torch.no_grad():
            for index in range(len(blocks.stages)):
                part = blocks.begin(index)
                sizes.append(blocks.num_bytes)
                blocks.settle(part, {n: x[part.rows[n]] for n, x in noise_of(batch).items()})
        return sizes

    growing, bounded = kept(TASKS["blocks"]), kept(TASKS["blocks, the last seen"])
    assert growing[1] < growing[2] < growing[3]
    assert bounded[1] == bounded[2] == bounded[3] == growing[1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["conditions first", "video to audio"])
def test_one_stage_is_the_plain_sampler_to_the_bit(model: MMDiT, name: str) -> None:
    batch = batch_of(TASKS[name])
    assert len(stages(batch)) == 1
    start = {
        n: x.where(
            (batch.modalities[n].role == int(Role.NOISED)).unsqueeze(1), batch.modalities[n].latents
        )
        for n, x in noise_of(batch).items()
    }
    plain = sample(velocity_field(model, OBJECTIVE, batch), start, TIMES)
    latents, _ = rolled(model, batch, remembers=False)
    assert set(latents) == set(plain)
    for stream, x in plain.items():
        assert torch.equal(latents[stream], x[batch.modalities[stream].role == int(Role.NOISED)])


@torch.no_grad()
def test_guidance_has_keys_of_its_own_for_each_condition(model: MMDiT) -> None:
    batch = batch_of(TASKS["blocks"])
    without = batch.with_latents({"text": torch.zeros_like(batch.modalities["text"].latents)})
    config = GuidanceConfig(scale=2.0)

    def combine(velocities: Sequence[VelocityFn], part: TokenBatch) -> VelocityFn:
        return guided(velocities[0], velocities[1], config, part)

    found = []
    for remembers in (None, model):
        both = [Blocks(model, OBJECTIVE, one, remembers) for one in (batch, without)]
        found.append(drawn(batch, dict(roll_out(both, combine, noise_of(batch), TIMES, "heun"))))
    unguided, _ = rolled(model, batch, remembers=False)
    for name, x in found[0].items():
        assert (found[1][name] - x).abs().max() < 1e-12 * x.abs().max()
        assert (unguided[name] - x).abs().max() > 1e-3


def test_clean_tokens_that_see_noised_ones_cannot_be_remembered() -> None:
    with pytest.raises(ValueError, match="clean tokens see noised ones"):
        stages(batch_of(TaskConfig(hidden={"video": ["text"]})))
