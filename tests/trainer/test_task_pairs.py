"""Under a ring every task is shared evenly, and only keys that some query there sees are sent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kinodit.data.packing import EncodedSample, PackSpec, StreamSpec, pack
from kinodit.data.synthetic import task_pack
from kinodit.data.tasks import DrawnTask
from kinodit.models.tokens import SampleKey, TokenBatch
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.pairs import keys_sent
from kinodit.trainer.parallel.sequence import Place, deal, pieces_of
from tests.support.counted import counted_step
from tests.support.pairs import imbalance, pairs_met
from tests.support.quick import quick
from tests.support.ranks import Ranks
from tests.support.tasks import CONDITIONS, MODEL, STREAMS, TASKS, may_see

MAX_IMBALANCE = 1.05
SPEC = PackSpec(
    (StreamSpec("text", 1), StreamSpec("video", 1, (1, 1, 1)), StreamSpec("audio", 1, (1, 1, 1)))
)


def clip(slot: int, name: str) -> EncodedSample:
    """Three seconds of 4 latent frames each, of 15 x 26 tokens, with their sound."""
    frames, second_s = 12, 1.0 / 4
    return EncodedSample(
        key=SampleKey(0, slot, f"clip:{slot}"),
        latents={
            "video": torch.zeros(1, frames, 15, 26),
            "audio": torch.zeros(1, 10 * frames, 1, 1),
        },
        seconds={"video": second_s, "audio": second_s / 10},
        text={"text": torch.zeros(77 + slot, 1)},
        conditions={},
        task=DrawnTask(name, TASKS[name], 0),
    )


@pytest.mark.parametrize("ring", [2, 4, 8])
@pytest.mark.tasks
@pytest.mark.parametrize("name", TASKS)
def test_pairs_of_a_task_are_shared_evenly(name: str, ring: int) -> None:
    layout = pack([clip(3, name)], SPEC).layout
    pieces = pieces_of(layout, Place(0, 1, ring))
    assert imbalance(layout, pieces) <= MAX_IMBALANCE
    pairs = pairs_met(pieces, layout.visible)
    assert sum(map(sum, pairs)) == layout.num_pairs
    for turn in range(ring):
        met = [pairs[hop][(hop - turn) % ring] for hop in range(ring)]
        assert max(met) * ring <= MAX_IMBALANCE * sum(met)


def test_pairs_of_all_tasks_in_one_pack_are_shared_evenly() -> None:
    layout = pack([clip(slot, name) for slot, name in enumerate(TASKS)], SPEC).layout
    for ring in (2, 4, 8, 16):
        assert imbalance(layout, pieces_of(layout, Place(0, 1, ring))) <= 1.005


def needed(sees: Tensor, batch: TokenBatch, ring: int) -> list[list[int]]:
    """[ring][ring]: keys of the second rank that some query of the first sees, token by token."""
    sizes = [tokens.num_tokens for tokens in batch.modalities.values()]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    dealt = deal(sizes, ring)
    held = [
        torch.cat([parts[one] + start for parts, start in zip(dealt, starts, strict=True)])
        for one in range(ring)
    ]
    return [[int(sees[here][:, there].any(0).sum()) for there in held] for here in held]


@pytest.mark.tasks
@pytest.mark.parametrize("name", TASKS)
def test_keys_are_sent_where_a_query_sees_them(name: str) -> None:
    batch = task_pack(0, [0, 1, 4, 5], STREAMS, CONDITIONS, torch.float32, {name: TASKS[name]}, 0)
    for ring in (2, 4, 8):
        wanted = needed(may_see(TASKS[name], batch), batch, ring)
        pieces = pieces_of(batch.layout, Place(0, 1, ring))
        for here in range(ring):
            for there in range(ring):
                if here != there:
                    sent = keys_sent(pieces, batch.layout.visible, here, there)
                    assert sum(sent) == wanted[here][there]


@pytest.mark.gloo
@pytest.mark.parametrize(
    "name",
    quick(
        ["sound by itself", "blocks", "blocks, the last seen", "conditions first"],
        "sound by itself",
        "blocks, the last seen",
    ),
)
def test_a_step_sends_those_keys_and_no_more(name: str, groups: dict[int, Ranks]) -> None:
    """Keys and values once in the forward and once in the backward, and their gradients back."""
    batch = task_pack(0, [4, 5], STREAMS, CONDITIONS, torch.float32, {name: TASKS[name]}, 0)
    parallel = ParallelConfig(cp=4, ring=4)
    ours = groups[4].run(counted_step, MODEL, parallel, [batch], "none")
    wanted = needed(may_see(TASKS[name], batch), batch, 4)
    keys = sum(wanted[here][there] for here in range(4) for there in range(4) if here != there)
    num_blocks = MODEL.num_double_blocks + MODEL.num_single_blocks
    a_key = 2 * MODEL.kv_heads * MODEL.dim_of_head * torch.float32.itemsize
    num_bytes = sum(counted.label("ring")[1] for counted in ours)
    assert num_bytes == 3 * num_blocks * keys * a_key
