"""Shadows of what happens between ranks: exchanges of tokens and heads, and attention over them.

Mirrors `trainer/parallel/collectives.py`, `trainer/parallel/context.py` and
`trainer/parallel/ring.py`. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kinodit.launch.plan.ops import Grads, Sizes, attention, cat, copy, split
from kinodit.launch.plan.shadow import Shadow, Storage, Tape


@dataclass(frozen=True)
class Crowd:
    """The ranks that share a pack, as the first of them sees it; counts of tokens.

    whole:    stream -> tokens of the pack
    own:      stream -> tokens that norms and gates are computed on here
    seen:     stream -> tokens that matrices are applied to here: those of all its tp ranks
    held:     tokens in attention here: those of all ranks that exchange heads
    ulysses, ring, tp: degrees
    permuted: whether tokens are put into another order for attention
    copied:   whether tp ranks have the same tokens (no sequence parallelism)
    segments: samples of the pack, as if of equal lengths
    deals_experts: whether rows travel to experts elsewhere; as many come as go
    """

    whole: Mapping[str, int]
    own: Mapping[str, int]
    seen: Mapping[str, int]
    held: int
    ulysses: int
    ring: int
    tp: int
    permuted: bool
    segments: int = 1
    deals_experts: bool = False
    copied: bool = False

    @property
    def num_ranks(self) -> int:
        """Those that share the pack, whatever they have of it."""
        return self.tp * self.ulysses * self.ring

    @property
    def num_shares(self) -> int:
        """Parts that its tokens are dealt out in."""
        return self.num_ranks // (self.tp if self.copied else 1)

    @property
    def num_own(self) -> int:
        """Tokens of all streams, own ones."""
        return sum(self.own.values())

    @property
    def num_seen(self) -> int:
        """Tokens of all streams that matrices see."""
        return sum(self.seen.values())


def gather(
    tape: Tape, parts: Mapping[str, Shadow], sizes: Mapping[str, int], crowd: Crowd
) -> dict[str, Shadow]:
    """`gather_rows` over tp: own tokens -> the tokens seen, of the given sizes."""
    tp = crowd.tp
    if tp == 1 or crowd.copied:
        return dict(parts)
    own = sum(part.nbytes for part in parts.values())
    flat, mine, buffer = tape.new(own), tape.new(own), tape.new(own * tp)
    outs = [(sizes[name], tape.new(sizes[name])) for name in parts]
    del flat, mine, buffer
    befores = [part.nbytes for part in parts.values()]

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        buffer = tape.new(own * tp)
        mine = tape.new(own)
        del buffer
        return [mine for _ in befores]

    made = tape.op(list(parts.values()), outs, [], back)
    return dict(zip(parts, made, strict=True))


def scatter(
    tape: Tape, parts: Mapping[str, Shadow], sizes: Mapping[str, int], crowd: Crowd
) -> dict[str, Shadow]:
    """`scatter_rows` over tp: sums over ranks for the own tokens, of the given sizes."""
    tp = crowd.tp
    if tp == 1:
        return dict(parts)
    if crowd.copied:
        return _sum_copies(tape, parts)
    own = sum(sizes[name] for name in parts)
    buffer = tape.new(own * tp)
    mine = tape.new(own)
    del buffer
    outs = [(sizes[name], mine) for name in parts]
    befores = [part.nbytes for part in parts.values()]

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        flat, kept, buffer = tape.new(own), tape.new(own), tape.new(own * tp)
        made: list[Storage | None] = [tape.new(size) for size in befores]
        del flat, kept, buffer
        return made

    made = tape.op(list(parts.values()), outs, [], back)
    return dict(zip(parts, made, strict=True))


def _sum_copies(tape: Tape, parts: Mapping[str, Shadow]) -> dict[str, Shadow]:
    """`sum_rows` over tp: what arrives are views of one message, forward and backward."""
    size, count = sum(part.nbytes for part in parts.values()), len(parts)
    flat = tape.new(size)

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        summed = tape.new(size)
        return [summed] * count

    outs = [(part.nbytes, flat) for part in parts.values()]
    del flat
    return dict(zip(parts, tape.op(list(parts.values()), outs, [], back), strict=True))


def attend(
    tape: Tape,
    q: Shadow,
    k: Shadow,
    v: Shadow,
    crowd: Crowd,
    sizes: Sizes,
    head_dim: int,
) -> Shadow:
    """The injected attention op, q and k, v of the tokens seen here."""
    if crowd.ulysses == 1:
        return _in_order(tape, q, k, v, crowd, sizes, head_dim)
    num_seen = crowd.num_seen
    unit = num_seen * head_dim * sizes.item
    kv_heads = k.nbytes // unit
    if kv_heads % crowd.ulysses:
        size = crowd.ulysses * unit
        k, v = copy(tape, k, size), copy(tape, v, size)
    home = q.nbytes
    q, k, v = _gather_heads(tape, q, k, v, crowd)
    return _scatter_heads(tape, _in_order(tape, q, k, v, crowd, sizes, head_dim), home)


def _gather_heads(
    tape: Tape, q: Shadow, k: Shadow, v: Shadow, crowd: Crowd
) -> tuple[Shadow, Shadow, Shadow]:
    joined = cat(tape, [q, k, v])
    sent = copy(tape, joined)
    del joined
    scale = crowd.held / (crowd.num_seen * crowd.ulysses)
    parts = [round(x.nbytes * scale) for x in (q, k, v)]
    received = copy(tape, sent, sum(parts))
    del sent
    q, k, v = split(tape, received, parts)
    return q, k, v


def _scatter_heads(tape: Tape, out: Shadow, home: int) -> Shadow:
    received, size = tape.new(home), out.nbytes

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        by_head = tape.new(home)
        made = tape.new(size)
        del by_head
        return [made]

    (arrived,) = tape.op([out], [(home, received)], [], back)
    del received
    together = tape.new(home)
    return tape.op([arrived], [(home, together)], [], lambda grads, _: [grads[0]])[0]


def _in_order(
    tape: Tape, q: Shadow, k: Shadow, v: Shadow, crowd: Crowd, sizes: Sizes, head_dim: int
) -> Shadow:
    """Attention of the tokens held here, in segment-major order."""
    if crowd.permuted:
        q, k, v = (copy(tape, x) for x in (q, k, v))
    if crowd.ring == 1:
        out = attention(tape, q, k, v, sizes, head_dim)
    else:
        out = _ring(tape, q, k, v, crowd, sizes, head_dim)
    return copy(tape, out) if crowd.permuted else out


def _ring(
    tape: Tape, q: Shadow, k: Shadow, v: Shadow, crowd: Crowd, sizes: Sizes, head_dim: int
) -> Shadow:
    """`trainer/parallel/ring.py`: the own keys and values, those of one turn and of the next.

    Each segment of each turn is an attention of its own: where those are kept, so are the partial
    results of all.
    """
    rows = q.nbytes // (head_dim * sizes.item)
    wide, both = sizes.widened(q.nbytes), k.nbytes + v.nbytes
    statistics, share = rows * sizes.wide, crowd.segments
    repeated = 2 * q.nbytes if k.nbytes < q.nbytes else 0
    total, lse = tape.new(wide), tape.new(statistics)
    # The third turn stands for all between it and the last, which has nothing on its way to it.
    turns = [1] * crowd.ring if crowd.ring < 4 else [1, 1, crowd.ring - 3, 1]
    own = tape.new(both)
    here = own
    for turn, times in enumerate(turns):
        following = tape.new(both if turn + 1 < len(turns) else 0)
        keys = tape.new(repeated // share)
        part = tape.product(q.nbytes // share, statistics // share, times=times * share)
        del keys
        merged = [tape.new(statistics // share) for _ in range(2)]
        widened = tape.new(wide // share if sizes.is_narrow else 0)
        merged.append(tape.new(statistics // share))
        tape.meter.made += (times * share - 1) * (repeated // share + widened.nbytes)
        del part, merged, widened
        here = following
    del here, following, own
    out = tape.new(q.nbytes) if sizes.is_narrow else total
    del total
    q_size, k_size, v_size = q.nbytes, k.nbytes, v.nbytes
    both_wide = sizes.widened(both)

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        grad_q, total, own = tape.new(wide), tape.new(both_wide), tape.new(both)
        here, sent, coming = own, tape.new(0), tape.new(0)
        for turn in range(len(turns)):
            following = tape.new(both if turn + 1 < len(turns) else 0)
            made = tape.new(both_wide if turn else 0)
            keys = tape.new(repeated // share)
            parts = [tape.new(q_size // share), tape.new((repeated or both) // share)]
            del keys
            summed = tape.new(sizes.widened(k_size) // share)
            del parts, summed
            if turn:
                del sent, coming
                sent, coming = made, tape.new(both_wide)
            here = following
        del here, following, own, made, sent, coming
        if sizes.is_narrow:
            total, grad_q = tape.new(both), tape.new(q_size)
        assert total.nbytes == k_size + v_size
        return [grad_q, total, total]

    return tape.op([q, k, v], [(q_size, out)], [q, k, v, out, lse], back)[0]
