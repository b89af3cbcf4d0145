"""Order without lists: a random permutation and a mixture, each one number at a time.

Both are pure functions with O(1) cost and memory in the size of a dataset, so that the place of
any sample in a run of any length is known without replaying what came before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from kinodit.models.errors import ConfigError
from kinodit.models.random import KeyPart, generator

NUM_ROUNDS = 8
"""Rounds of the Feistel network. Four make a pseudo-random permutation of a random function (Luby
and Rackoff, SIAM J. Comput. 17, 1988); the round function here is a mixer, so twice as many."""

MAX_PERIOD = 1 << 16
"""Slots after which a mixture repeats, at most. Finer weights are rounded to this many parts."""


def permute(positions: NDArray[np.uint64], size: int, *key: KeyPart) -> NDArray[np.uint64]:
    """Where a keyed random permutation of `range(size)` sends `positions`.

    A Feistel network over the fewest bits that hold `size`, with cycle walking: a value outside of
    the range is permuted again until it falls inside (Black and Rogaway, "Ciphers with arbitrary
    finite domains", CT-RSA 2002, section 3). Fewer than two walks on average.

    Args:
        positions: uint64 [n], each below `size`.
        size: how many things are permuted, at least 1 and at most 2**62.
        key: names the permutation, as in `kinodit.models.random.generator`.

    Returns:
        uint64 [n].
    """
    return _permute(positions, size, _round_keys(key)[:, None])


def permute_each(
    positions: NDArray[np.uint64],
    size: int,
    keys: Sequence[tuple[KeyPart, ...]],
    which: NDArray[np.int64],
) -> NDArray[np.uint64]:
    """As `permute`, of each position by the one of `keys` whose number `which` [n] has there."""
    if len(keys) == 1:
        return permute(positions, size, *keys[0])
    return _permute(positions, size, np.stack([_round_keys(key) for key in keys], 1)[:, which])


def _permute(
    positions: NDArray[np.uint64], size: int, round_keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """[n]; `round_keys` are [rounds, n], or [rounds, 1] where they are those of all positions."""
    num_bits = max(2, (size - 1).bit_length())
    values = _feistel(positions, num_bits, round_keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        own = round_keys if round_keys.shape[1] == 1 else round_keys[:, outside]
        walked = _feistel(values[outside], num_bits, own)
        values[outside] = walked
        outside = outside[walked >= size]
    return values


def permute_by_blocks(
    positions: NDArray[np.uint64], size: int, chunk: int, chunks_per_block: int, *key: KeyPart
) -> NDArray[np.uint64]:
    """A keyed permutation of `range(size)` whose neighbours come from few places.

    The range, turned by a random amount, is cut into chunks of `chunk`; the chunks are permuted; of
    every `chunks_per_block` of them the members are permuted together. What is left of the range
    beyond whole chunks comes last; which part that is, the turn decides.

    Args:
        positions: uint64, [n], each below `size`.
        size: how many things are permuted.
        chunk: neighbours that stay close: about a shard.
        chunks_per_block: chunks that are mixed.
        key: names the permutation.

    Returns:
        uint64 [n].
    """
    whole = size // chunk
    if whole <= chunks_per_block:
        return permute(positions, size, *key)
    turn = int(generator(*key, "turn").integers(0, size))
    found = np.empty_like(positions)
    span = chunk * chunks_per_block
    block_of = np.minimum(positions // np.uint64(span), np.uint64(-(-whole // chunks_per_block)))
    block_of[positions >= whole * chunk] = np.iinfo(np.uint64).max
    for block in np.unique(block_of).tolist():
        mine = block_of == block
        if block == np.iinfo(np.uint64).max:
            rest = positions[mine] - np.uint64(whole * chunk)
            found[mine] = permute(rest, size - whole * chunk, *key, "rest") + np.uint64(
                whole * chunk
            )
            continue
        first = block * chunks_per_block
        count = min(chunks_per_block, whole - first)
        within = permute(
            positions[mine] - np.uint64(block * span), count * chunk, *key, "block", block
        )
        chunks = permute(np.uint64(first) + within // np.uint64(chunk), whole, *key, "chunks")
        found[mine] = chunks * np.uint64(chunk) + within % np.uint64(chunk)
    return (found + np.uint64(turn)) % np.uint64(size)


@lru_cache(maxsize=256)
def _round_keys(key: tuple[KeyPart, ...]) -> NDArray[np.uint64]:
    draws = generator(*key).integers(0, 2**64, size=NUM_ROUNDS, dtype=np.uint64)
    # It is kept, and given to all who ask.
    draws.flags.writeable = False
    return draws


def _feistel(
    values: NDArray[np.uint64], num_bits: int, round_keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """An alternating Feistel network: the halves may differ by a bit and swap widths each round."""
    narrow, wide = num_bits // 2, num_bits - num_bits // 2
    left, right = values >> np.uint64(wide), values & np.uint64((1 << wide) - 1)
    shifts = np.uint64(64 - narrow), np.uint64(64 - wide)
    for index, round_key in enumerate(round_keys):
        mixed = _mixed(right ^ round_key)
        mixed >>= shifts[index % 2]
        mixed ^= left
        left, right = right, mixed
    # An even number of rounds: the widths are where they began.
    return (left << np.uint64(wide)) | right


_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`values`, changed in place by the finaliser of SplitMix64: every bit affects all.

    Steele, Lea and Flood, OOPSLA 2014.
    """
    values ^= values >> _SHIFTS[0]
    values *= _FACTORS[0]
    values ^= values >> _SHIFTS[1]
    values *= _FACTORS[1]
    values ^= values >> _SHIFTS[2]
    return values


def shares_of(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole-number shares in proportion to `weights`, with a sum of at most `MAX_PERIOD`.

    Exact for weights such as 0.7 and 0.3, or 1, 2 and 5. Weights that need finer parts than
    1 / MAX_PERIOD are rounded to them (largest remainder).

    Raises:
        ConfigError: a weight is not a positive finite number, or so small beside the others that
            rounding would change it by more than a tenth.
    """
    for weight in weights:
        if not 0 < weight < float("inf"):
            raise ConfigError(
                f"a dataset's weight must be a positive number, found {weight}: "
                "give it a weight above 0, or leave the dataset out"
            )
    # Through the decimal text: 0.7 means seven tenths, not the nearest binary fraction.
    exact = [Fraction(str(float(weight))) for weight in weights]
    parts = [part / sum(exact) for part in exact]
    period = int(np.lcm.reduce([part.denominator for part in parts], dtype=object))
    if period <= MAX_PERIOD:
        return tuple(int(part * period) for part in parts)
    wanted = [part * MAX_PERIOD for part in parts]
    shares = [int(part) for part in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda d: (shares[d] - wanted[d], d))
    for d in by_remainder[: MAX_PERIOD - sum(shares)]:
        shares[d] += 1
    for weight, share, part in zip(weights, shares, wanted, strict=True):
        if abs(share - part) > part / 10:
            raise ConfigError(
                f"a dataset's weight of {weight} is {float(part) / MAX_PERIOD:.2g} of the mixture, "
                f"and shares below about {5 / MAX_PERIOD:.0g} cannot be kept exactly: raise the "
                "weight, or leave the dataset out"
            )
    return tuple(shares)


@dataclass(frozen=True)
class Mixture:
    """Which dataset fills each slot of a run: a sequence that repeats after `period` slots.

    shares:  D whole numbers, the slots of each dataset in one period
    choice:  [period] int32, the dataset of each slot
    ordinal: [period] int64, how many earlier slots of the period have the same dataset
    """

    shares: tuple[int, ...]
    choice: NDArray[np.int32]
    ordinal: NDArray[np.int64]

    @property
    def period(self) -> int:
        """Number of slots after which the sequence repeats."""
        return len(self.choice)

    def slots(self, first: int, count: int) -> tuple[NDArray[np.int32], int, NDArray[np.int64]]:
        """The datasets of the slots `first .. first + count`, and each one's place in its dataset.

        The place counts from 0 over the whole run: the k-th slot of a dataset has place k.

        Returns:
            [count] datasets; whole periods before `first`; [count] places since then. Slot s of
            dataset d has place `periods * shares[d] + places[s]`, which may be any number.
        """
        periods, start = divmod(first, self.period)
        turns, within = np.divmod(np.arange(start, start + count), self.period)
        datasets = self.choice[within]
        places = turns * np.array(self.shares)[datasets] + self.ordinal[within]
        return datasets, periods, places


@lru_cache(maxsize=16)
def mixture(shares: tuple[int, ...]) -> Mixture:
    """The sequence of datasets whose counts stay within 1 of their shares at every prefix.

    Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980,
    theorem 1): of the datasets that are due, the one whose deadline is nearest. The count of
    dataset d among the first n slots differs from n * share_d / period by at most
    1 - 1 / (2 D - 2), for every n.
    """
    period = sum(shares)
    slack = max(1, 2 * len(shares) - 2)
    counts = [0] * len(shares)
    choice = np.empty(period, dtype=np.int32)
    ordinal = np.empty(period, dtype=np.int64)
    for slot in range(period):
        best, best_margin = -1, 0
        for dataset, share in enumerate(shares):
            deficit = slack * (share * (slot + 1) - period * counts[dataset])
            if deficit < period and len(shares) > 1:
                continue
            # Slots to the deadline are margin / share; compared as cross products, exactly.
            margin = period * (slack - 1) - deficit
            if best < 0 or margin * shares[best] < best_margin * share:
                best, best_margin = dataset, margin
        choice[slot], ordinal[slot] = best, counts[best]
        counts[best] += 1
    choice.flags.writeable = False
    ordinal.flags.writeable = False
    return Mixture(shares, choice, ordinal)
