"""The ops of the model, as shadows: what each makes, keeps, and needs in its backward.

Each mirrors a function of `models/` and says which. Where a kernel of CUDA and one of a CPU keep
different things, `Sizes.cuda` decides: plans are for CUDA, and are checked on a CPU.

All sizes are bytes unless they are called rows, tokens, heads or widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kinodit.launch.plan.shadow import Shadow, Storage, Tape

Grads = list[Storage | None]

INDEX_BYTES = 8
"""Of a number that says where something is: int64."""


@dataclass(frozen=True)
class Sizes:
    """item: bytes of a number of forward and backward; levels: rows of the noise-level table."""

    item: int
    levels: int
    cuda: bool

    @property
    def wide(self) -> int:
        """Bytes of a number of statistics: at least float32."""
        return max(self.item, 4)

    @property
    def is_narrow(self) -> bool:
        """Whether tensors are copied where statistics are taken of them."""
        return self.item < self.wide

    def widened(self, nbytes: int) -> int:
        """The size of such a copy."""
        return nbytes // self.item * self.wide


def linear(tape: Tape, x: Shadow, size: int, gathered: int = 0) -> Shadow:
    """`nn.Linear`. `gathered`: of a weight that is put together for it out of tp ranks' parts."""
    saved: list[Storage | Shadow] = [x]
    if gathered:
        buffer = tape.new(gathered)
        whole = tape.new(gathered)
        del buffer
        # Autograd keeps a weight for the gradient of the input, where that has one.
        saved += [whole] if x.node is not None else []
    (out,) = tape.product(size)
    x_size = x.nbytes

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        return [tape.new(x_size)]

    return tape.op([x], [(size, out)], saved, back)[0]


def pointwise(tape: Tape, x: Shadow, keeps: bool = True) -> Shadow:
    """An op on each number alone, such as GELU, that keeps its input."""
    out, size = tape.new(x.nbytes), x.nbytes
    return tape.op([x], [(size, out)], [x] if keeps else [], lambda *_: [tape.new(size)])[0]


def multiply(tape: Tape, x: Shadow, y: Shadow) -> Shadow:
    """x * y, which keeps both."""
    out, sizes = tape.new(max(x.nbytes, y.nbytes)), (x.nbytes, y.nbytes)

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        return [tape.new(size) for size in sizes]

    return tape.op([x, y], [(out.nbytes, out)], [x, y], back)[0]


def add(tape: Tape, x: Shadow, y: Shadow) -> Shadow:
    """x + y of one shape."""
    out = tape.new(x.nbytes)
    return tape.op([x, y], [(x.nbytes, out)], [], lambda grads, _: [grads[0], grads[0]])[0]


def cat(tape: Tape, parts: Sequence[Shadow]) -> Shadow:
    """`torch.cat`: gradients of the parts are views."""
    size = sum(part.nbytes for part in parts)
    out, count = tape.new(size), len(parts)
    return tape.op(parts, [(size, out)], [], lambda grads, _: [grads[0]] * count)[0]


def split(tape: Tape, x: Shadow, sizes: Sequence[int]) -> list[Shadow]:
    """`torch.split`: the parts are views; their gradients are put together."""
    size = x.nbytes
    outs = [(part, x.storage) for part in sizes]
    return tape.op([x], outs, [], lambda *_: [tape.new(size)])


def copy(tape: Tape, x: Shadow, size: int | None = None) -> Shadow:
    """A copy in another order, or with repeated heads; so is its gradient."""
    out, before = tape.new(x.nbytes if size is None else size), x.nbytes
    return tape.op([x], [(out.nbytes, out)], [], lambda *_: [tape.new(before)])[0]


def permute(tape: Tape, x: Shadow, size: int, index: Sequence[Storage]) -> Shadow:
    """Rows of `x` picked by an index that is kept, as `models/moe/layer.py: _Spread` does."""
    out, before = tape.new(size), x.nbytes
    # Rows that come more than once have gradients of their own before they are added up.
    between = size if size > before else 0

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        by_row = tape.new(between)
        made = tape.new(before)
        del by_row
        return [made]

    return tape.op([x], [(size, out)], index, back)[0]


def add_spread(tape: Tape, x: Shadow, rows: int) -> Shadow:
    """x + the bias of each of its rows, as `models/moe/experts.py: grouped_linear`."""
    index, spread = tape.new(rows * INDEX_BYTES), tape.new(x.nbytes)
    out = tape.new(x.nbytes)
    del spread
    return tape.op([x], [(x.nbytes, out)], [index], lambda grads, _: [grads[0]])[0]


def score(tape: Tape, logits: Shadow) -> Shadow:
    """Scores of `models/moe/router.py`: softmax keeps what it gives, the z-loss the logits."""
    out, size = tape.new(logits.nbytes), logits.nbytes
    return tape.op([logits], [(size, out)], [logits, out], lambda *_: [tape.new(size)])[0]


def divide_by_sum(tape: Tape, x: Shadow, sums: int) -> Shadow:
    """x / x.sum(-1), which keeps `x` and the sums."""
    total, out, size = tape.new(sums), tape.new(x.nbytes), x.nbytes
    return tape.op([x], [(size, out)], [x, total], lambda *_: [tape.new(size)])[0]


def weigh(tape: Tape, x: Shadow, gates: Shadow, sizes: Sizes, top_k: int) -> Shadow:
    """(x * gates).sum over the `top_k` rows of a token, in the format of gates, then in that of x.

    Both gradients are there in the wide format and full size before they are made narrow or summed.
    """
    size, wide = x.nbytes, sizes.widened(x.nbytes)
    of_gates = gates.nbytes
    product = tape.new(wide)
    out = tape.new(wide // top_k)
    del product
    if sizes.is_narrow:
        out = tape.new(size // top_k)

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        grad = tape.new(wide // top_k) if sizes.is_narrow else None
        made, product = tape.new(wide), tape.new(wide)
        del grad, product
        return [tape.new(size) if sizes.is_narrow else made, tape.new(of_gates)]

    return tape.op([x, gates], [(size // top_k, out)], [x, gates], back)[0]


def ada_norm(
    tape: Tape,
    x: Shadow,
    rows: Shadow,
    sizes: Sizes,
    width: int,
    *,
    is_rms: bool,
    has_shift: bool,
) -> Shadow:
    """`models/modulation.py: AdaNorm`; `rows` of the condition."""
    if not is_rms and has_shift:
        return _modulated_norm(tape, x, rows, sizes, width)
    normed = rms_norm(tape, x, sizes, width) if is_rms else layer_norm(tape, x, sizes, width)
    one_level = sizes.levels == 1
    scale = tape.leaf(width * sizes.item if one_level else x.nbytes)
    scaled = _scale(tape, normed, scale)
    del normed
    if not has_shift:
        return scaled
    shift = None if one_level else tape.new(x.nbytes)
    out, size = tape.new(x.nbytes), x.nbytes
    del shift
    return tape.op([scaled], [(size, out)], [], lambda grads, _: [grads[0]])[0]


def _scale(tape: Tape, x: Shadow, scale: Shadow) -> Shadow:
    out, size = tape.new(x.nbytes), x.nbytes

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        grad_x = tape.new(size)
        tape.new(size)  # of the scale, before it is summed over tokens
        return [grad_x]

    return tape.op([x], [(size, out)], [x, scale], back)[0]


def layer_norm(tape: Tape, x: Shadow, sizes: Sizes, width: int) -> Shadow:
    """`F.layer_norm` without weights, or with one row of them."""
    out, size = tape.new(x.nbytes), x.nbytes
    statistics = tape.new(2 * (size // (width * sizes.item)) * sizes.wide)
    return tape.op([x], [(size, out)], [x, statistics], lambda *_: [tape.new(size)])[0]


def _modulated_norm(tape: Tape, x: Shadow, rows: Shadow, sizes: Sizes, width: int) -> Shadow:
    """`models/modulation.py: modulated_norm`."""
    if sizes.levels == 1:
        return layer_norm(tape, x, sizes, width)
    size = x.nbytes
    normed, rstd = tape.new(size), tape.new(size // (width * sizes.item) * sizes.wide)
    scale, shift = tape.new(size), tape.new(size)
    out = tape.new(size)
    del scale, shift

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        _segment_sum(tape, size, sizes)
        product = tape.new(size)
        _segment_sum(tape, size, sizes)
        del product
        grad_normed = tape.new(size)
        made = tape.new(size)
        del grad_normed
        return [made]

    return tape.op([x], [(size, out)], [normed, rstd, rows], back)[0]


def _segment_sum(tape: Tape, size: int, sizes: Sizes) -> None:
    """`models/modulation.py: segment_sum`, whose result is a few rows."""
    if not sizes.cuda and sizes.is_narrow:
        tape.new(sizes.widened(size))


def rms_norm(tape: Tape, x: Shadow, sizes: Sizes, width: int) -> Shadow:
    """`models/norm.py: RMSNorm`: one kernel on CUDA, a chain of them on a CPU."""
    size, wide = x.nbytes, sizes.widened(x.nbytes)
    rstd = tape.new(x.nbytes // (width * sizes.item) * sizes.wide)
    if sizes.cuda:
        out = tape.new(size)
        return tape.op([x], [(size, out)], [x, rstd], lambda *_: [tape.new(size)])[0]
    source: Storage | Shadow = tape.new(wide) if sizes.is_narrow else x
    squares = tape.new(wide)
    del squares
    normed, out = tape.new(wide), tape.new(wide)
    if sizes.is_narrow:
        out = tape.new(size)

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        widened = tape.new(wide) if sizes.is_narrow else None
        grad_normed = tape.new(wide)
        tape.new(wide)
        del widened
        made = tape.new(wide)
        tape.new(wide)
        del grad_normed
        of_mean, power = tape.new(wide), tape.new(wide)
        doubled = tape.new(wide)
        del power
        product = tape.new(wide)
        del of_mean, doubled, product
        return [tape.new(size) if sizes.is_narrow else made]

    return tape.op([x], [(size, out)], [source, normed, rstd], back)[0]


def head_norm(tape: Tape, x: Shadow, sizes: Sizes, head_dim: int, rotary: Shadow | None) -> Shadow:
    """`models/norm.py: HeadNorm`: norm of each head, and rotation."""
    size, wide = x.nbytes, sizes.widened(x.nbytes)
    widened = tape.new(wide) if sizes.is_narrow else None
    rstd = tape.new(size // (head_dim * sizes.item) * sizes.wide)
    out = tape.new(wide)
    if sizes.is_narrow:
        out = tape.new(size)
    del widened
    is_rotated = rotary is not None

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        grad = tape.new(wide) if sizes.is_narrow else None
        if is_rotated:
            grad = tape.new(wide)
        normed, product = tape.new(wide), tape.new(wide)
        made = tape.new(wide)
        del grad, normed, product
        return [tape.new(size) if sizes.is_narrow else made]

    saved: list[Storage | Shadow] = [x, rstd] if rotary is None else [x, rstd, rotary]
    return tape.op([x], [(size, out)], saved, back)[0]


def rotate(tape: Tape, x: Shadow, sizes: Sizes, rotary: Shadow) -> Shadow:
    """`models/rope.py: rotate`."""
    size, wide = x.nbytes, sizes.widened(x.nbytes)

    def turned() -> Storage:
        widened = tape.new(wide) if sizes.is_narrow else None
        made = tape.new(wide)
        del widened
        return tape.new(size) if sizes.is_narrow else made

    return tape.op([x], [(size, turned())], [rotary], lambda *_: [turned()])[0]


def gated_add(tape: Tape, x: Shadow, branch: Shadow, rows: Shadow, sizes: Sizes) -> Shadow:
    """`models/modulation.py: gated_add`; its gates are among `rows`."""
    size = x.nbytes
    out = tape.new(size)

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        product = tape.new(size)
        if sizes.levels > 1:
            _segment_sum(tape, size, sizes)
        del product
        return [grads[0], tape.new(size)]

    return tape.op([x, branch], [(size, out)], [rows, branch], back)[0]


def attention(tape: Tape, q: Shadow, k: Shadow, v: Shadow, sizes: Sizes, head_dim: int) -> Shadow:
    """Flash attention: keeps its inputs, its output and log-sum-exp."""
    rows = q.nbytes // (head_dim * sizes.item)
    out, lse = tape.product(q.nbytes, rows * sizes.wide)
    inputs = (q.nbytes, k.nbytes, v.nbytes)

    def back(grads: Grads, saved: list[Storage]) -> list[Storage | None]:
        made = [tape.new(size) for size in inputs]
        if sizes.cuda:
            # Flash attention sums gradients of queries in float32, and makes those of keys and
            # values for every query head before it adds up heads that share them.
            extra = sizes.widened(inputs[0])
            tape.new(extra + (2 * inputs[0] if inputs[1] < inputs[0] else 0))
        return [*made]

    return tape.op([q, k, v], [(q.nbytes, out)], [q, k, v, out, lse], back)[0]
