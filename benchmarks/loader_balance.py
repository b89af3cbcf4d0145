"""Padding and balance of packs over 64 data-parallel ranks, of two mixes of images and clips.

Ranks of one sharded model wait for each other in every forward pass (micro-step), so the rows
`balance/...` are the sum over micro-steps of the maximum over ranks, divided by the mean: 1 is no
waiting. A sample of L tokens costs L + L^2 / parity, as the FLOPs of the 2b preset have it.
`padding/...` are tokens that are computed and belong to no sample, as a share of those computed;
`discarded/...` tokens of the source that no step trains on.

- packed: the trainer's own plan, `packing: budget`, packs bounded by tokens and by cost;
- class: `packing: class`, one size in each micro-step; sides are multiples of 128 pixels, clips
  have one of seven lengths, and 64 steps are planned together;
- buckets: resolution x aspect x duration buckets as people use them: clips are cut down to their
  bucket, every rank takes batches of whichever bucket comes, what fills no batch is left out;
- random: batches of 8 drawn at random, padded to the longest.

Mixes: "stated" is 20 % images, short sides of 256 to 720 pixels, five aspect ratios, log-normal
durations of 5.5 s (median, sigma 0.7). "internvid" follows the statistics of InternVid (Wang et
al., arXiv 2307.06942, section 3): 760 thousand hours in 234 million clips are 11.7 s each, most of
them under 10 s; 85 % are of 720 lines, the others of 360 to 720. A log-normal law of sigma 1 with
that mean has 64 % under 10 s. Clips are sampled at 16 fps up to 15 s; of longer ones a window is
taken, by all alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from goals import Row
from numpy.typing import NDArray

from kinodit.data.config import DecodeConfig
from kinodit.data.fill import cost_of
from kinodit.data.packing import EncodedSample, PackSpec, StreamSpec, pack
from kinodit.data.plan import GlobalBatch, SampleRef, plan
from kinodit.data.shapes import IMAGE, VIDEO, Grid, grid_of, native_shapes
from kinodit.data.spec import CostModel, DatasetSpec, Packing, PlanSpec
from kinodit.models.encoders.base import grid_shape
from kinodit.models.presets import PRESETS
from kinodit.models.tokens import SampleKey
from kinodit.trainer.encoders import parity_tokens

RANKS = 64
STRIDE, TILE = (4, 8, 8), (16, 16)
MAX_FRAMES, FPS = 241, 16.0
TEXT_TOKENS = 256
SAMPLES_PER_STEP, WINDOW_STEPS, CLASS_WINDOW_STEPS = 2048, 8, 64
LENGTHS = (17, 33, 65, 97, 129, 193, MAX_FRAMES)
"""Frames of clips in few classes."""
BATCH = 8
MAX_PADDING, MAX_BALANCE = 0.005, 1.05
PARITY = parity_tokens(PRESETS["2b"])
DECODE = DecodeConfig(height=720, width=1280, num_frames=MAX_FRAMES, fps=FPS)
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Mix:
    """Samples of a corpus, [n] each: modality, frames at 24 fps, rows, columns."""

    modality: Ints
    frames: Ints
    height: Ints
    width: Ints


def draw(seed: int, count: int, images: float, lines: Ints, median_s: float, sigma: float) -> Mix:
    """A mix of which short sides are drawn from `lines`."""
    source = np.random.default_rng(seed)
    still = source.random(count) < images
    aspect = source.choice([16 / 9, 4 / 3, 1.0, 3 / 4, 9 / 16], count)
    short = source.choice(lines, count)
    seconds = np.exp(source.normal(np.log(median_s), sigma, count))
    long_side = np.round(short * np.maximum(aspect, 1 / aspect)).astype(np.int64)
    return Mix(
        modality=np.where(still, IMAGE, VIDEO),
        frames=np.where(still, 1, np.maximum(np.round(seconds * 24), 8)).astype(np.int64),
        height=np.where(aspect >= 1, short, long_side),
        width=np.where(aspect >= 1, long_side, short),
    )


def stated(count: int) -> Mix:
    """The mix "stated" of the module's text."""
    return draw(1, count, 0.2, np.arange(256, 721, 16), 5.5, 0.7)


def internvid(count: int) -> Mix:
    """The mix "internvid"; the median of a log-normal law of mean 11.7 s and sigma 1 is 7.1 s."""
    lower = np.arange(360, 720, 24)
    lines = np.concatenate([np.full(85 * len(lower), 720), np.repeat(lower, 15)])
    return draw(2, count, 0.0, lines, 11.7 * float(np.exp(-0.5)), 1.0)


def codec_grid(coarse: bool = False) -> Grid:
    """Of a video autoencoder of stride 4 x 8 x 8, first frame alone, in patches of 1 x 2 x 2."""

    def layers(frames: int) -> int | None:
        return grid_shape((frames, 8, 8), STRIDE, True)[0] if frames % 4 == 1 else None

    if coarse:
        return grid_of(layers, MAX_FRAMES, TILE, (1, *LENGTHS), 128)
    return grid_of(layers, MAX_FRAMES, TILE)


def spec_of(mix: Mix, packing: Packing) -> PlanSpec:
    """The frozen plan of a dataset of this mix."""
    grid = codec_grid(coarse=packing == "class")
    rate = np.full(len(mix.frames), 24_000)
    sizes, _ = native_shapes(mix.modality, mix.frames, rate, mix.height, mix.width, DECODE, grid)
    shapes, shape_of = np.unique(sizes, axis=0, return_inverse=True)
    table = tuple((int(t), int(h), int(w)) for t, h, w in shapes.tolist())
    of_shape = np.array([grid.tokens(shape) for shape in table])
    longest = grid.tokens((MAX_FRAMES, DECODE.height, DECODE.width)) + TEXT_TOKENS
    dataset = DatasetSpec(
        "mix", "", len(rate), tokens=of_shape[shape_of.reshape(-1)] + TEXT_TOKENS,
        shapes=table, shape_of=shape_of.reshape(-1),
    )  # fmt: skip
    return PlanSpec(
        (dataset,),
        SAMPLES_PER_STEP,
        RANKS,
        seed=0,
        token_budget=longest,
        cost=CostModel(longest, None, parity_tokens=PARITY),
        packing=packing,
        cost_budget=int(cost_of(np.array([longest]), PARITY)[0]),
        window_steps=CLASS_WINDOW_STEPS if packing == "class" else WINDOW_STEPS,
    )


def waiting(costs: Ints) -> float:
    """The sum of maxima over ranks by the sum of means; `costs` [micro-steps * RANKS] as dealt."""
    steps = costs[: len(costs) // RANKS * RANKS].reshape(-1, RANKS)
    return float(steps.max(1).sum() / steps.mean(1).sum())


def ours(mix: Mix, packing: Packing) -> tuple[list[GlobalBatch], PlanSpec]:
    """One epoch of whole windows."""
    spec = spec_of(mix, packing)
    windows = len(mix.frames) // (SAMPLES_PER_STEP * spec.window_steps)
    return [plan(spec, step) for step in range(windows * spec.window_steps)], spec


def lost(batches: list[GlobalBatch], spec: PlanSpec) -> float:
    """Share of the epoch's samples that are in no pack, or in one twice."""
    seen = [ref.index for batch in batches for pack in batch.packs for ref in pack]
    wanted = len(batches) * spec.samples_per_step
    return 1 - len(set(seen)) / wanted + (len(seen) - len(set(seen)))


def padding_of(batches: list[GlobalBatch]) -> float:
    """Of packs as the model gets them: tokens without a sample, as a share of all."""
    spec, real, made = PackSpec((StreamSpec("text", 1), StreamSpec("video", 1, (1, 2, 2)))), 0, 0
    grid = codec_grid()
    for part in batches[0].packs[:: max(1, len(batches[0].packs) // 6)]:
        real += sum(grid.tokens(ref.shape) + TEXT_TOKENS for ref in part if ref.shape)
        made += pack([encoded(ref) for ref in part], spec).num_tokens
    return 1 - real / made


def encoded(ref: SampleRef) -> EncodedSample:
    """The sample with latents of its size, of one channel."""
    assert ref.shape is not None
    frames, height, width = ref.shape
    latents = torch.zeros(1, *grid_shape((frames, height, width), STRIDE, True))
    text = {"text": torch.zeros(TEXT_TOKENS, 1)}
    key = SampleKey(0, ref.slot, ref.sample_id)
    return EncodedSample(key, {"video": latents}, {"video": STRIDE[0] / FPS}, text, {})


def buckets(spec: PlanSpec, mix: Mix) -> tuple[float, float]:
    """(balance, share of tokens discarded) of resolution x aspect x duration buckets."""
    dataset = spec.datasets[0]
    assert dataset.shape_of is not None
    sizes = np.array(dataset.shapes)[dataset.shape_of]
    total = int(np.asarray(dataset.tokens).sum())
    short, aspect = np.minimum(mix.height, mix.width), mix.width / mix.height
    lines = np.array([256, 360, 480, 720])
    lengths = np.array(LENGTHS)
    ratios = np.array([16 / 9, 4 / 3, 1.0, 3 / 4, 9 / 16])
    line = lines[np.maximum(np.searchsorted(lines, short, side="right") - 1, 0)]
    ratio = ratios[np.abs(aspect[:, None] / ratios - 1).argmin(1)]
    length = np.where(mix.modality == IMAGE, 1, 0)
    bin_of = np.searchsorted(lengths, sizes[:, 0], side="right")
    length = np.where((mix.modality == VIDEO) & (bin_of > 0), lengths[bin_of - 1], length)
    rows = np.where(ratio >= 1, line, line / ratio) // TILE[0]
    columns = np.where(ratio >= 1, line * ratio, line) // TILE[1]
    tokens = ((length + 3) // 4 * rows * columns).astype(np.int64) + TEXT_TOKENS
    tokens[length == 0] = 0
    costs, used = [], 0
    assert spec.token_budget is not None
    names = np.stack([length, line, (ratio * 1000).astype(np.int64)], 1)
    _, bucket_of = np.unique(names, axis=0, return_inverse=True)
    for bucket in np.unique(bucket_of):
        members = np.flatnonzero((bucket_of.reshape(-1) == bucket) & (tokens > 0))
        if not len(members):
            continue
        each = int(tokens[members[0]])
        size = max(1, spec.token_budget // each)
        batches = len(members) // size
        used += batches * size * each
        costs += [size * int(cost_of(np.array([each]), PARITY)[0])] * batches
    dealt = np.random.default_rng(3).permutation(np.array(costs, dtype=np.int64))
    return waiting(dealt), 1 - used / total


def random_batches(spec: PlanSpec) -> tuple[float, float]:
    """(balance, padding) of batches drawn at random and padded to their longest sample."""
    tokens = np.asarray(spec.datasets[0].tokens)
    drawn = np.random.default_rng(4).permutation(tokens)
    batches = drawn[: len(drawn) // BATCH * BATCH].reshape(-1, BATCH)
    longest = batches.max(1)
    padding = 1 - batches.sum() / (BATCH * longest.sum())
    return waiting(BATCH * cost_of(longest, PARITY)), float(padding)


def rows(count: int = SAMPLES_PER_STEP * CLASS_WINDOW_STEPS) -> Iterator[Row]:
    """All rows; those of the mix "stated" have no suffix."""
    for suffix, mix in (("", stated(count)), ("/internvid", internvid(count))):
        batches, spec = ours(mix, "budget")
        assert spec.token_budget is not None
        packs = sum(len(batch.packs) for batch in batches)
        used = sum(sum(batch.tokens) for batch in batches) / packs / spec.token_budget
        packed = waiting(np.array([cost for batch in batches for cost in batch.costs]))
        filled = f"budget of {spec.token_budget} tokens {100 * used:.1f} % used"
        yield Row.at_most(f"padding/packed{suffix}", padding_of(batches), MAX_PADDING, filled)
        yield Row.exactly(f"discarded/packed{suffix}", lost(batches, spec), 0.0)
        yield Row.at_most(f"balance/packed{suffix}", packed, MAX_BALANCE, f"{RANKS} ranks")
        by_class, spec_of_class = ours(mix, "class")
        balance, gone = buckets(spec, mix)
        value = waiting(np.array([cost for batch in by_class for cost in batch.costs]))
        yield Row.at_most(f"balance/class{suffix}", value, balance, "the goal is that of buckets")
        yield Row.exactly(f"discarded/class{suffix}", lost(by_class, spec_of_class), 0.0)
        yield at_least(f"balance/buckets{suffix}", balance, packed)
        yield at_least(f"discarded/buckets{suffix}", gone, 0.0)
        balance, padding = random_batches(spec)
        yield at_least(f"balance/random{suffix}", balance, packed)
        yield at_least(f"padding/random{suffix}", padding, MAX_PADDING)


def at_least(name: str, value: float, ours_: float) -> Row:
    """A rival's figure, which ours (the goal shown) has to be no worse than."""
    return Row(name, value, ours_, value >= ours_, "a rival; the goal is ours")
