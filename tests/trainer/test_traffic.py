"""Whatever crosses between ranks in a training step is counted, and is the least there can be."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from kinodit.models.config import StreamConfig
from kinodit.models.mmdit import MMDiT, MMDiTConfig
from kinodit.models.moe.config import ExpertsConfig, RouterConfig
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.parallel.apply import PrecisionConfig, model_blocks
from kinodit.trainer.parallel.expert import EXPERTS
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.sequence import Place, pieces_of
from kinodit.trainer.parallel.tensor import SCORES
from kinodit.trainer.parallel.traffic import Traffic, note, others_share
from kinodit.trainer.parallel.volume import Formats, Volume, Work, least, weights_of
from tests.support.counted import Counted, counted_step
from tests.support.packs import Sample, build_pack, clean, noised
from tests.support.pairs import part_sent
from tests.support.quick import quick
from tests.support.ranks import Ranks

MODEL = MMDiTConfig(
    streams={
        "text": StreamConfig(8, output=False, position="none"),
        "video": StreamConfig(8),
    },
    conditions={},
    width=32,
    num_heads=4,
    num_double_blocks=2,
    num_single_blocks=2,
)
"""Every dim divides by 4, so that no shard is padded."""
UNEVEN = replace(
    MODEL,
    streams={**MODEL.streams, "text": StreamConfig(8, output=False, position="none", width=16)},
    head_dim=8,
    num_kv_heads=2,
    num_single_blocks=0,
    modulation_rank=4,
)
"""A narrower stream that ends early, fewer key/value heads, thin matrices that are stored split."""


def pack(num_text: int, num_video: int) -> TokenBatch:
    """Two samples."""
    parts = [(1, 1), (num_text - 1, num_video - 1)]
    return build_pack(
        [
            Sample(f"{index}", {"text": clean(text), "video": noised(video)})
            for index, (text, video) in enumerate(parts)
        ],
        {"text": 8, "video": 8},
    )


EVEN, ODD = pack(8, 24), pack(8, 23)
FORMATS = Formats(4, 4, 4)

LAYOUTS = {
    "fsdp2": (2, ParallelConfig(), "none"),
    "ddp2": (2, ParallelConfig(dp_replicate=2), "none"),
    "tp2": (2, ParallelConfig(tp=2), "full"),
    "kept": (2, ParallelConfig(reshard_after_forward=False), "none"),
    "ring2": (2, ParallelConfig(cp=2, ring=2), "full"),
    "hsdp2x2": (4, ParallelConfig(dp_replicate=2), "full"),
    "ulysses2": (2, ParallelConfig(cp=2), "none"),
    "ulysses2 x ring2": (4, ParallelConfig(cp=4, ring=2), "none"),
    "ring2 x tp2": (4, ParallelConfig(cp=2, ring=2, tp=2), "none"),
    "ddp2 x tp2": (4, ParallelConfig(dp_replicate=2, tp=2), "none"),
}
"""(ranks, layout, what is recomputed)"""
MODELS = {"single": MODEL, "uneven": UNEVEN}


def is_complete(counted: Counted) -> bool:
    """Whether what was reported is what was sent."""
    messages, num_bytes = counted.by_kind()
    assert not counted.unknown
    return messages == counted.wire_messages and num_bytes == counted.wire_bytes


def test_messages_are_counted_while_someone_counts() -> None:
    note("before", "all_reduce", 5)
    with Traffic() as outer:
        note("tp", "all_gather", 10)
        with Traffic() as inner:
            note("tp", "all_gather", 30)
            note("tp", "reduce_scatter", 7)
            note("ring", "transfer", 2)
        note("ring", "transfer", 4)
    note("after", "all_reduce", 5)
    assert outer.labels == {"tp", "ring"}
    assert outer.total("tp") == (3, 47)
    assert outer.total("ring") == (2, 6)
    assert inner.total("tp") == (2, 37)
    assert inner.total("ring") == (1, 2)
    assert inner.total("after") == (0, 0)


def test_share_of_others() -> None:
    assert others_share(torch.zeros(12), 4) == 36
    assert others_share(torch.zeros(12, dtype=torch.bfloat16), 3) == 16


def least_of(
    config: MMDiTConfig, batch: TokenBatch, name: str, passes: int = 1, formats: Formats = FORMATS
) -> dict[str, Volume]:
    world_size, parallel, remat = LAYOUTS[name]
    _, num_shards = parallel.resolve(world_size)
    model = MMDiT(config)
    blocks = model_blocks(model)
    place = Place(0, parallel.ulysses, parallel.ring, 0, parallel.tp)
    work = Work(
        config,
        weights_of(model, blocks, parallel.tp, parallel.ep),
        {name: tokens.num_tokens for name, tokens in batch.modalities.items()},
        len(batch.level_t),
        [2 if remat == "full" else 1] * len(blocks),
        passes,
        part_sent(pieces_of(batch.layout, place), batch.layout.visible),
    )
    return least(work, replace(parallel, dp_shard=num_shards), formats)


def means(ranks: list[Counted]) -> dict[str, Volume]:
    """Label -> bytes and messages, on average over ranks."""
    labels = {label for counted in ranks for label, _ in counted.messages} - {"control"}
    found = {}
    for label in labels:
        messages, num_bytes = zip(*(counted.label(label) for counted in ranks), strict=True)
        assert len(set(messages)) == 1
        found[label] = Volume(sum(num_bytes) / len(ranks), messages[0])
    return found


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("model", "name"),
    quick(
        itertools.product(MODELS, LAYOUTS),
        *(("single", name) for name in ("tp2", "kept", "hsdp2x2", "ulysses2")),
        ("uneven", "ring2 x tp2"),
    ),
)
def test_a_step_sends_the_least_there_can_be(
    model: str, name: str, groups: dict[int, Ranks]
) -> None:
    world_size, parallel, remat = LAYOUTS[name]
    ours = groups[world_size].run(counted_step, MODELS[model], parallel, [EVEN, EVEN], remat)
    assert all(is_complete(counted) for counted in ours)
    assert means(ours) == least_of(MODELS[model], EVEN, name, passes=2)
    assert {counted.label("control")[0] for counted in ours} == {2}


DEALT = {
    "ep2": (2, ParallelConfig(ep=2), "full"),
    "ddp2 x ep2": (4, ParallelConfig(dp_replicate=2, ep=2), "none"),
    "ep2 of ulysses2": (2, ParallelConfig(cp=2, ep=2), "none"),
    "ep2 x tp2": (4, ParallelConfig(tp=2, ep=2), "none"),
}
BY_STREAM = replace(
    MODEL, experts={"all": ExpertsConfig(2, 1, 1.0, 1.0, router=RouterConfig("modality"))}
)


@pytest.mark.gloo
@pytest.mark.parametrize("name", quick(DEALT, "ep2", "ddp2 x ep2"))
def test_rows_travel_to_experts_elsewhere_alone(
    name: str, groups: dict[int, Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the tokens are of either stream, so either rank's expert has half of them."""
    monkeypatch.setitem(LAYOUTS, name, DEALT[name])
    world_size, parallel, remat = DEALT[name]
    batch = pack(16, 16)
    ours = groups[world_size].run(counted_step, BY_STREAM, parallel, [batch] * 2, remat)
    assert all(is_complete(counted) for counted in ours)
    expected = least_of(BY_STREAM, batch, name, passes=2)
    assert means(ours) == expected
    runs = 2 if remat == "full" else 1
    rows = 32 // parallel.cp // 2
    # Two blocks, two passes, there and back.
    assert expected[EXPERTS].num_bytes == 2 * 2 * 2 * (runs + 1) * rows * MODEL.width * 4


COMPETING = ExpertsConfig(
    4, 2, 1.0, router=RouterConfig(choice="expert", renormalise=False, balance="none")
)
BY_SCORE = replace(MODEL, experts={"video": COMPETING, "all": COMPETING})


@pytest.mark.gloo
@pytest.mark.parametrize("name", quick(["tp2", "ulysses2", "ring2 x tp2"], "tp2", "ulysses2"))
def test_scores_of_tokens_that_compete_travel_once(name: str, groups: dict[int, Ranks]) -> None:
    world_size, parallel, remat = LAYOUTS[name]
    ours = groups[world_size].run(counted_step, BY_SCORE, parallel, [EVEN], remat)
    assert all(is_complete(counted) for counted in ours)
    expected = least_of(BY_SCORE, EVEN, name)
    assert means(ours) == expected
    # Two joint blocks in which 24 tokens compete, two single ones with 32: 4 scores each, and whose
    # sample a token is.
    runs = 2 if remat == "full" else 1
    numbers = 2 * (24 + 32) * 5 * (world_size - 1) / world_size
    assert expected[SCORES] == Volume(numbers * 4 * runs, 4 * runs)


def islands(batch: TokenBatch) -> TokenBatch:
    """Every token of a segment sees itself and the first one."""
    whole = batch.layout
    segments = [
        owner
        for owner, length in zip(whole.segments, whole.lengths, strict=True)
        for _ in range(length)
    ]
    first = {owner: segments.index(owner) for owner in segments}
    visible = tuple(tuple(sorted({first[owner], place})) for place, owner in enumerate(segments))
    layout = replace(whole, lengths=(1,) * len(segments), segments=tuple(segments), visible=visible)
    return replace(batch, layout=layout)


@pytest.mark.gloo
@pytest.mark.parametrize("name", quick(["ring2", "ulysses2 x ring2", "ring2 x tp2"], "ring2"))
def test_a_ring_sends_the_keys_that_a_query_there_sees(name: str, groups: dict[int, Ranks]) -> None:
    batch = islands(EVEN)
    world_size, parallel, remat = LAYOUTS[name]
    ours = groups[world_size].run(counted_step, MODEL, parallel, [batch], remat)
    assert all(is_complete(counted) for counted in ours)
    messages, num_bytes = zip(*(counted.label("ring") for counted in ours), strict=True)
    least, most = (least_of(MODEL, pack, name)["ring"] for pack in (batch, EVEN))
    assert sum(num_bytes) / world_size == least.num_bytes
    # Two of 32 tokens are first ones, which the one rank of the ring that lacks them may need.
    assert 0 < least.num_bytes < most.num_bytes * 3 / 32
    # Ranks that need nothing are not sent anything.
    assert max(messages) <= most.messages


@pytest.mark.gloo
def test_gradients_travel_in_the_format_that_they_are_summed_in(groups: dict[int, Ranks]) -> None:
    name, precision = "ring2 x tp2", PrecisionConfig(compute="bfloat16")
    ours = groups[4].run(counted_step, MODEL, LAYOUTS[name][1], [EVEN], "none", precision)
    assert all(is_complete(counted) for counted in ours)
    assert means(ours) == least_of(MODEL, EVEN, name, formats=Formats(4, 2, 4))


@pytest.mark.gloo
def test_lengths_that_do_not_divide_cost_at_most_a_token_a_rank(groups: dict[int, Ranks]) -> None:
    found = means(groups[4].run(counted_step, MODEL, LAYOUTS["ring2 x tp2"][1], [ODD]))
    expected = least_of(MODEL, ODD, "ring2 x tp2")
    assert found["ring"] == expected["ring"]
    assert found["fsdp"] == expected["fsdp"]
    assert found["tp"].messages == expected["tp"].messages
    assert found["tp"].num_bytes / expected["tp"].num_bytes == pytest.approx(32 / 31)
    found = means(groups[2].run(counted_step, MODEL, LAYOUTS["ulysses2"][1], [ODD]))
    assert found == least_of(MODEL, ODD, "ulysses2")


@pytest.mark.gloo
def test_a_message_without_a_label_is_found(groups: dict[int, Ranks]) -> None:
    args = (MODEL, ParallelConfig(), [EVEN], "none", None, True)
    for counted in groups[2].run(counted_step, *args):
        assert not is_complete(counted)


@pytest.mark.gloo
@pytest.mark.parametrize("name", quick(["fsdp2", "hsdp2x2", "ddp2 x tp2"], "fsdp2"))
def test_gradients_are_reduced_once_for_all_micro_batches(
    name: str, groups: dict[int, Ranks]
) -> None:
    world_size, parallel, _ = LAYOUTS[name]
    one, four = (
        groups[world_size].run(counted_step, MODEL, parallel, packs)
        for packs in ([EVEN], [EVEN] * 4)
    )
    reduced = [
        ("fsdp", "reduce_scatter"),
        ("hsdp", "all_reduce"),
        ("whole gradients", "all_reduce"),
    ]
    sent = 0
    for of_one, of_four in zip(one, four, strict=True):
        for key in reduced:
            assert of_four.label(*key) == of_one.label(*key)
            sent += of_one.label(*key)[0]
        assert of_four.label("control") == of_one.label("control")
    assert sent > 0
