"""The forward of the model's parts, written once more with shadows, variable by variable.

Mirrors `models/mmdit.py`, `models/block.py` and `models/embed.py` for the tokens that one rank has.
All sizes are bytes unless they are called tokens, rows or widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kinodit.launch.plan import ops
from kinodit.launch.plan.ops import Sizes
from kinodit.launch.plan.seams import Crowd, attend, gather, scatter
from kinodit.launch.plan.shadow import Shadow, Storage, Tape
from kinodit.models.config import SINGLE, MMDiTConfig
from kinodit.models.embed import NUM_FEATURES
from kinodit.models.mlp import hidden_width
from kinodit.models.moe.config import ExpertsConfig

Streams = dict[str, Shadow]


@dataclass(frozen=True)
class Pass:
    """What one rank computes in one forward and backward.

    levels, segments: rows of the noise-level table and samples of the pack
    """

    model: MMDiTConfig
    crowd: Crowd
    sizes: Sizes
    segments: int

    def tokens(self, count: int, width: int) -> int:
        """Bytes of `count` tokens of `width`."""
        return count * width * self.sizes.item


class Blocks:
    """The forward of a model's parts on a tape."""

    def __init__(self, tape: Tape, work: Pass) -> None:
        self.tape, self.work = tape, work
        self.sizes, self.crowd, self.model = work.sizes, work.crowd, work.model
        self.inner = self.model.num_heads * self.model.dim_of_head // self.crowd.tp
        self.inner_kv = self.model.kv_heads * self.model.dim_of_head // self.crowd.tp
        table = self.model.dim_of_head * self.sizes.wide
        self.rotary = {
            name: tape.leaf(self.crowd.seen[name] * table) if stream.position == "rope" else None
            for name, stream in self.model.streams.items()
        }
        self.condition, self.shared = self._condition()
        self.merged: Shadow | None = None

    def merge(self) -> None:
        """Make the rotary table of all streams' tokens, for single blocks."""
        if any(table is not None for table in self.rotary.values()):
            table = self.model.dim_of_head * self.sizes.wide
            self.merged = self.tape.leaf(self.crowd.num_seen * table)

    def _condition(self) -> tuple[Shadow, list[Shadow]]:
        """`ConditionEmbed`, activated, and the rows of modulation that all blocks share."""
        model, sizes = self.model, self.sizes
        total = self._vector_mlp(NUM_FEATURES, sizes.levels)
        for condition in model.conditions.values():
            features = NUM_FEATURES if condition.kind == "scalar" else condition.dim
            made = self._vector_mlp(features, self.work.segments)
            total = ops.add(self.tape, total, ops.copy(self.tape, made, total.nbytes))
        activated = ops.pointwise(self.tape, total)
        widths = []
        if model.modulation_rank and model.num_double_blocks:
            for name in model.streams:
                widths.append(2 * model.parts_per_branch * model.stream_width(name))
        if model.modulation_rank and model.num_single_blocks:
            widths.append(model.parts_per_branch * model.stream_width(next(iter(model.streams))))
        return activated, [self._rows(activated, width) for width in widths]

    def _vector_mlp(self, features: int, rows: int) -> Shadow:
        """`VectorMLP` of `rows` vectors."""
        width = self.model.width_of_condition
        size = rows * width * self.sizes.item
        x = self.tape.leaf(rows * features * self.sizes.item)
        hidden = ops.linear(self.tape, x, size, self._stored(features * width))
        hidden = ops.pointwise(self.tape, hidden)
        return ops.linear(self.tape, hidden, size, self._stored(width * width))

    def _stored(self, numbers: int) -> int:
        """Bytes of a matrix that is split at rest and whole in use; 0 where it is not split."""
        return numbers * self.sizes.item if self.crowd.tp > 1 else 0

    def _rows(self, condition: Shadow, width: int) -> Shadow:
        """A column-split linear over levels whose columns are put together."""
        size = self.sizes.levels * width * self.sizes.item
        part = ops.linear(self.tape, condition, size // self.crowd.tp)
        return part if self.crowd.tp == 1 else ops.copy(self.tape, part, size)

    def _modulation(self, width: int, parts: int) -> Shadow:
        """`Modulation.project` and `rows`, together with the rows of 1 + scale."""
        condition, rank = self.condition, self.model.modulation_rank
        if rank:
            down = self._stored(self.model.width_of_condition * rank)
            size = self.sizes.levels * rank * self.sizes.item
            condition = ops.linear(self.tape, condition, size, down)
        rows = self._rows(condition, parts * width)
        if rank:
            rows = ops.pointwise(self.tape, rows, keeps=False)
        if self.model.modulation == "scale_gate":
            ops.pointwise(self.tape, Shadow(rows.nbytes // 2, rows.storage, rows.node, rows.slot))
        return rows

    def embed(self, name: str) -> Shadow:
        """`StreamEmbed`."""
        tape, model = self.tape, self.model
        stream, width = model.streams[name], model.stream_width(name)
        count = self.crowd.own[name]
        if stream.refiner_blocks:
            # Every rank that shares the pack refines the whole stream.
            count *= self.crowd.num_shares
        x = tape.leaf(self.work.tokens(count, stream.in_channels))
        stored = self._stored(stream.in_channels * width)
        x = ops.linear(tape, x, self.work.tokens(count, width), stored)
        if stream.position == "sincos_2d":
            features = tape.new(count * width * self.sizes.wide)
            x = ops.pointwise(tape, x, keeps=False)
            del features
        for _ in range(stream.refiner_blocks):
            x = self._refiner_block(x, count, width)
        if stream.refiner_blocks and self.crowd.num_ranks > 1:
            x = ops.copy(tape, x, self.work.tokens(self.crowd.own[name], width))
        return x

    def _refiner_block(self, x: Shadow, count: int, width: int) -> Shadow:
        """`RefinerBlock`, whose matrices are stored split and used whole."""
        tape, sizes, model = self.tape, self.sizes, self.model
        inner = model.num_heads * model.dim_of_head
        hidden = round(model.mlp_ratio * width)
        tokens = self.work.tokens
        size = sizes.levels * 2 * width * sizes.item
        rows = ops.linear(tape, self.condition, size, self._stored(2 * width * width))
        normed = ops.layer_norm(tape, x, sizes, width)
        q, k, v = (
            ops.linear(tape, normed, tokens(count, inner), self._stored(width * inner))
            for _ in range(3)
        )
        out = ops.attention(tape, q, k, v, sizes, model.dim_of_head)
        out = ops.linear(tape, out, tokens(count, width), self._stored(width * inner))
        x = ops.gated_add(tape, x, out, rows, sizes)
        normed = ops.layer_norm(tape, x, sizes, width)
        up = ops.linear(tape, normed, tokens(count, hidden), self._stored(width * hidden))
        up = ops.pointwise(tape, up)
        down = ops.linear(tape, up, tokens(count, width), self._stored(width * hidden))
        return ops.gated_add(tape, x, down, rows, sizes)

    def head(self, name: str, x: Shadow) -> Shadow:
        """`Head` of a stream, and the squared error of its prediction."""
        tape, sizes, model = self.tape, self.sizes, self.model
        width, count = model.stream_width(name), self.crowd.own[name]
        has_shift = model.modulation == "shift_scale_gate"
        rows = sizes.levels * (1 + has_shift) * width * sizes.item
        stored = self._stored(model.width_of_condition * (1 + has_shift) * width)
        made = ops.linear(tape, self.condition, rows, stored)
        normed = ops.ada_norm(tape, x, made, sizes, width, is_rms=False, has_shift=has_shift)
        out = model.out_channels(name)
        predicted = ops.linear(
            tape, normed, self.work.tokens(count, out), self._stored(width * out)
        )
        del normed, made
        target = tape.new(count * out * sizes.wide)
        size, wide = predicted.nbytes, target.nbytes
        error = tape.new(wide)
        squares = tape.new(wide)
        del squares, target

        def back(grads: ops.Grads, saved: list[Storage]) -> list[Storage | None]:
            spread, power, doubled = tape.new(wide), tape.new(wide), tape.new(wide)
            made = tape.new(wide)
            del spread, power, doubled
            return [tape.new(size) if sizes.is_narrow else made]

        return tape.op([predicted], [(sizes.wide, tape.new(sizes.wide))], [error], back)[0]

    def joint(self, x: Mapping[str, Shadow], index: int) -> Streams:
        """`JointBlock.forward` of block `index`."""
        model, crowd = self.model, self.crowd
        last = {name for name in model.streams if model.is_last(name, index)}
        branches = {name: 1 if name in last else 2 for name in model.streams}
        parts = {
            name: branches[name] * model.parts_per_branch - (name in last) for name in model.streams
        }
        rows = {
            name: self._modulation(model.stream_width(name), parts[name]) for name in model.streams
        }
        going_on = [name for name in model.streams if name not in last]
        own = self._sizes(crowd.own, model.stream_width)
        attended = self._attend(x, rows)
        made = {}
        for name in going_on:
            made[name] = ops.linear(self.tape, attended[name], self._seen(name))
        branch = scatter(self.tape, made, own, crowd)
        del made
        x = {**x}
        for name in going_on:
            x[name] = self._gated(x[name], branch[name], rows[name], name)
        normed = {name: self._norm(x[name], rows[name], name) for name in going_on}
        seen = {name: self._seen(name) for name in going_on}
        hidden = gather(self.tape, normed, seen, crowd)
        made = {}
        for name in going_on:
            width = model.stream_width(name)
            experts = model.experts_in(name, index)
            made[name] = self._feed_forward(hidden[name], crowd.seen[name], width, experts)
        branch = scatter(self.tape, made, own, crowd)
        del made
        for name in going_on:
            x[name] = self._gated(x[name], branch[name], rows[name], name)
        return x

    def _attend(self, x: Mapping[str, Shadow], rows: Mapping[str, Shadow]) -> Streams:
        tape, model, crowd = self.tape, self.model, self.crowd
        normed = {name: self._norm(x[name], rows[name], name) for name in x}
        seen = gather(tape, normed, {name: self._seen(name) for name in x}, crowd)
        parts = [self._project(seen[name], crowd.seen[name], self.rotary[name]) for name in x]
        q, k, v = (ops.cat(tape, tensors) for tensors in zip(*parts, strict=True))
        joint = attend(tape, q, k, v, crowd, self.sizes, model.dim_of_head)
        sizes = [self.work.tokens(crowd.seen[name], self.inner) for name in x]
        return dict(zip(x, ops.split(tape, joint, sizes), strict=True))

    def single(self, x: Shadow, index: int) -> Shadow:
        """`SingleBlock.forward` of block `index`."""
        tape, model, crowd = self.tape, self.model, self.crowd
        width = model.stream_width(next(iter(model.streams)))
        rows = self._modulation(width, model.parts_per_branch)
        seen = self.work.tokens(crowd.num_seen, width)
        normed = self._norm(x, rows, next(iter(model.streams)))
        if crowd.tp > 1 and not crowd.copied:
            arrived = gather(tape, {"all": normed}, {"all": seen}, crowd)["all"]
            normed = ops.copy(tape, arrived)
            del arrived
        q, k, v = self._project(normed, crowd.num_seen, self.merged)
        attended = attend(tape, q, k, v, crowd, self.sizes, model.dim_of_head)
        both = ops.add(
            tape,
            ops.linear(tape, attended, seen),
            self._feed_forward(normed, crowd.num_seen, width, model.experts_in(SINGLE, index)),
        )
        branch = both
        if crowd.tp > 1:
            own = self.work.tokens(crowd.num_own, width)
            branch = scatter(tape, {"all": both}, {"all": own}, crowd)["all"]
            if not crowd.copied:
                branch = ops.copy(tape, branch)
        return self._gated(x, branch, rows, next(iter(model.streams)))

    def _seen(self, name: str) -> int:
        return self.work.tokens(self.crowd.seen[name], self.model.stream_width(name))

    def _sizes(self, counts: Mapping[str, int], width: Callable[[str], int]) -> dict[str, int]:
        return {name: self.work.tokens(count, width(name)) for name, count in counts.items()}

    def _norm(self, x: Shadow, rows: Shadow, name: str) -> Shadow:
        return ops.ada_norm(
            self.tape,
            x,
            rows,
            self.sizes,
            self.model.stream_width(name),
            is_rms=self.model.block_norm == "rms",
            has_shift=self.model.modulation == "shift_scale_gate",
        )

    def _gated(self, x: Shadow, branch: Shadow, rows: Shadow, name: str) -> Shadow:
        if self.model.sandwich_norm:
            width = self.model.stream_width(name)
            branch = ops.rms_norm(self.tape, branch, self.sizes, width)
        return ops.gated_add(self.tape, x, branch, rows, self.sizes)

    def _project(
        self, x: Shadow, count: int, rotary: Shadow | None
    ) -> tuple[Shadow, Shadow, Shadow]:
        """`Projections.forward`."""
        tape, dim = self.tape, self.model.dim_of_head
        inner, inner_kv = (self.work.tokens(count, n) for n in (self.inner, self.inner_kv))
        q, k, v = (ops.linear(tape, x, size) for size in (inner, inner_kv, inner_kv))
        if self.model.qk_norm == "rms":
            q = ops.head_norm(tape, q, self.sizes, dim, rotary)
            k = ops.head_norm(tape, k, self.sizes, dim, rotary)
        elif rotary is not None:
            q = ops.rotate(tape, q, self.sizes, rotary)
            k = ops.rotate(tape, k, self.sizes, rotary)
        return q, k, v

    def _feed_forward(
        self, x: Shadow, count: int, width: int, experts: ExpertsConfig | None
    ) -> Shadow:
        """`MoE.forward`, with experts that share the tokens evenly, or `MLP.forward`."""
        if experts is None:
            return self._mlp(x, count, width, self.model.mlp_ratio)
        tape, rows = self.tape, count * experts.top_k
        gates = self._route(x, count, experts)
        # The order of rows by expert, and the way back.
        order, inverse = tape.new(rows * ops.INDEX_BYTES), tape.new(rows * ops.INDEX_BYTES)
        size = self.work.tokens(rows, width)
        spread = ops.permute(tape, x, size, [inverse])
        if self.crowd.deals_experts:
            came = ops.copy(tape, spread)
            shared = self._shared(x, count, width, experts)
            made = self._ordered(came, rows, width, experts)
            del came
        else:
            made = self._mlp(spread, rows, width, experts.expert_ratio, is_grouped=True)
            shared = self._shared(x, count, width, experts)
        del spread
        back = ops.permute(tape, made, size, [inverse, order])
        del made, order, inverse
        weighed = ops.weigh(tape, back, gates, self.sizes, experts.top_k)
        del back, gates
        return weighed if shared is None else ops.add(tape, weighed, shared)

    def _shared(self, x: Shadow, count: int, width: int, experts: ExpertsConfig) -> Shadow | None:
        """What the expert gives that all tokens meet, if there is one."""
        if not experts.shared_ratio:
            return None
        return self._mlp(x, count, width, experts.shared_ratio)

    def _ordered(self, came: Shadow, rows: int, width: int, experts: ExpertsConfig) -> Shadow:
        """`ExpertExchange` after rows came: they are put in the order of experts, and back."""
        tape, size = self.tape, came.nbytes
        order, inverse = tape.new(rows * ops.INDEX_BYTES), tape.new(rows * ops.INDEX_BYTES)
        ordered = ops.permute(tape, came, size, [order, inverse])
        made = self._mlp(ordered, rows, width, experts.expert_ratio, is_grouped=True)
        del ordered
        back = ops.permute(tape, made, size, [order, inverse])
        del made, order, inverse
        return ops.copy(tape, back)

    def _route(self, x: Shadow, count: int, experts: ExpertsConfig) -> Shadow:
        """`Router.forward`: the gates."""
        tape, router, wide = self.tape, experts.router, self.sizes.wide
        size = count * experts.top_k * wide
        if not router.is_learned:
            return tape.leaf(size)
        if self.sizes.is_narrow:
            x = ops.copy(tape, x, self.sizes.widened(x.nbytes))
        logits = ops.linear(tape, x, count * experts.num_experts * wide)
        del x
        scores = ops.score(tape, logits)
        # The chosen experts are a view of all of them in order.
        index = tape.new(count * experts.num_experts * ops.INDEX_BYTES)
        gates = ops.permute(tape, scores, size, [index])
        if router.renormalise:
            gates = ops.divide_by_sum(tape, gates, count * wide)
        return ops.pointwise(tape, gates, keeps=False)

    def _mlp(
        self, x: Shadow, count: int, width: int, ratio: float, *, is_grouped: bool = False
    ) -> Shadow:
        """`MLP.forward`, or `Experts.forward` of rows in groups."""
        tape = self.tape
        inner = hidden_width(width, ratio, self.model.activation)
        size = self.work.tokens(count, inner // self.crowd.tp)

        def linear(x: Shadow, size: int) -> Shadow:
            made = ops.linear(tape, x, size)
            is_spread = is_grouped and self.model.bias
            return ops.add_spread(tape, made, count) if is_spread else made

        hidden = linear(x, size)
        if self.model.activation == "swiglu":
            hidden = ops.multiply(tape, ops.pointwise(tape, linear(x, size)), hidden)
        else:
            hidden = ops.pointwise(tape, hidden)
        return linear(hidden, self.work.tokens(count, width))
