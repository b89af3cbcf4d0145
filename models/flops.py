"""Parameters and FLOPs of a model, from its config alone.

A multiply-add is two FLOPs; only matrix products count, as in torch's `FlopCounterMode`. The
backward of a forward of F FLOPs takes 2F.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kinodit.models.config import SINGLE, MMDiTConfig
from kinodit.models.embed import NUM_FEATURES
from kinodit.models.mlp import hidden_width
from kinodit.models.moe.config import ExpertsConfig


@dataclass(frozen=True)
class Matrix:
    """A linear layer: `fan_in` -> `fan_out`, applied to the rows named by `rows`.

    rows: "tokens/NAME" (tokens of a stream), "tokens" (of all streams), "levels" (rows of the
          noise-level table) or "segments"
    copies: experts that have such a matrix each
    uses:   how many of them a row is multiplied with; the mean where experts choose, and the most
            where a capacity drops some
    """

    fan_in: int
    fan_out: int
    rows: str
    has_bias: bool = True
    copies: int = 1
    uses: int = 1

    @property
    def parameters(self) -> int:
        """Weights and biases, of all copies."""
        return self.copies * self._parameters

    @property
    def active_parameters(self) -> int:
        """Those that one row meets."""
        return self.uses * self._parameters

    @property
    def _parameters(self) -> int:
        return self.fan_in * self.fan_out + (self.fan_out if self.has_bias else 0)


def count_parameters(config: MMDiTConfig) -> int:
    """Number of parameters of `MMDiT(config)`."""
    return sum(matrix.parameters for matrix in matrices(config)) + _norm_parameters(config)


def count_active_parameters(config: MMDiTConfig) -> int:
    """The parameters that one token meets: of the experts, as many as it goes to."""
    active = sum(matrix.active_parameters for matrix in matrices(config))
    return active + _norm_parameters(config)


def forward_flops(
    config: MMDiTConfig,
    tokens: Mapping[str, int],
    num_pairs: int,
    num_segments: int,
    num_levels: int,
    pairs_within: Mapping[str, int] | None = None,
) -> int:
    """FLOPs of one forward pass over one pack.

    tokens:       stream -> number of tokens
    num_pairs:    (query, key) pairs of the joint attention, `AttentionLayout.num_pairs`
    num_segments: S
    num_levels:   K, rows of the noise-level table
    pairs_within: stream -> pairs of tokens of the same segment, for streams with a refiner; without
                  it, the tokens are taken as spread evenly over the segments
    """
    rows = {"levels": num_levels, "segments": num_segments, "tokens": sum(tokens.values())}
    rows |= {f"tokens/{name}": count for name, count in tokens.items()}
    total = sum(2 * m.uses * m.fan_in * m.fan_out * rows[m.rows] for m in matrices(config))
    inner = config.num_heads * config.dim_of_head
    num_blocks = config.num_double_blocks + config.num_single_blocks
    total += num_blocks * 4 * num_pairs * inner
    for name, stream in config.streams.items():
        if not stream.refiner_blocks:
            continue
        if pairs_within is None:
            pairs = tokens[name] ** 2 // max(num_segments, 1)
        else:
            pairs = pairs_within[name]
        total += stream.refiner_blocks * 4 * pairs * inner
        total += 2 * num_segments * tokens[name] * stream.in_channels  # the segments' means
    return total


def matrices(config: MMDiTConfig) -> Iterator[Matrix]:
    """Every linear layer of the model."""
    c = config.width_of_condition
    for name, stream in config.streams.items():
        width = config.stream_width(name)
        yield Matrix(stream.in_channels, width, f"tokens/{name}")
        yield from _refiner(config, name)
        if stream.output:
            has_shift = config.modulation == "shift_scale_gate"
            yield Matrix(c, (1 + has_shift) * width, "levels")
            yield Matrix(width, config.out_channels(name), f"tokens/{name}")
    yield from _vector_mlp(NUM_FEATURES, c, "levels")
    for condition in config.conditions.values():
        features = NUM_FEATURES if condition.kind == "scalar" else condition.dim
        yield from _vector_mlp(features, c, "segments")
    for name in config.streams:
        width = config.stream_width(name)
        if config.modulation_rank and config.num_double_blocks:
            yield Matrix(c, 2 * config.parts_per_branch * width, "levels", has_bias=False)
        for index in range(config.num_double_blocks):
            yield from _stream_layer(config, name, index)
    if config.num_single_blocks:
        width = config.stream_width(next(iter(config.streams)))
        if config.modulation_rank:
            yield Matrix(c, config.parts_per_branch * width, "levels", has_bias=False)
        for index in range(config.num_single_blocks):
            yield from _modulation(config, config.parts_per_branch * width)
            yield from _attention(config, width, "tokens", has_out=True, out_bias=False)
            yield from _mlp(config, width, "tokens", config.experts_in(SINGLE, index))


def _stream_layer(config: MMDiTConfig, name: str, index: int) -> Iterator[Matrix]:
    width, rows, is_last = config.stream_width(name), f"tokens/{name}", config.is_last(name, index)
    parts = config.parts_per_branch - 1 if is_last else 2 * config.parts_per_branch
    yield from _modulation(config, parts * width)
    yield from _attention(config, width, rows, has_out=not is_last, out_bias=config.bias)
    if not is_last:
        yield from _mlp(config, width, rows, config.experts_in(name, index))


def _modulation(config: MMDiTConfig, fan_out: int) -> Iterator[Matrix]:
    c, rank = config.width_of_condition, config.modulation_rank
    if rank:
        yield Matrix(c, rank, "levels", has_bias=False)
    yield Matrix(rank or c, fan_out, "levels")


def _attention(
    config: MMDiTConfig, width: int, rows: str, has_out: bool, out_bias: bool
) -> Iterator[Matrix]:
    inner = config.num_heads * config.dim_of_head
    inner_kv = config.kv_heads * config.dim_of_head
    for fan_out in (inner, inner_kv, inner_kv):
        yield Matrix(width, fan_out, rows, config.qkv_bias)
    if has_out:
        yield Matrix(inner, width, rows, out_bias)


def _mlp(
    config: MMDiTConfig, width: int, rows: str, experts: ExpertsConfig | None
) -> Iterator[Matrix]:
    if experts is None:
        yield from _feed_forward(config, width, rows, config.mlp_ratio)
        return
    if experts.router.is_learned:
        by_token = experts.router.kind == "token"
        inputs, times = (width, rows) if by_token else (config.width_of_condition, "levels")
        if experts.router.hidden_ratio:
            hidden = round(experts.router.hidden_ratio * inputs)
            yield Matrix(inputs, hidden, times)
            inputs = hidden
        yield Matrix(inputs, experts.num_experts, times, has_bias=False)
    sizes = experts.num_experts, experts.top_k
    yield from _feed_forward(config, width, rows, experts.expert_ratio, *sizes)
    if experts.shared_ratio:
        yield from _feed_forward(config, width, rows, experts.shared_ratio)


def _feed_forward(
    config: MMDiTConfig, width: int, rows: str, ratio: float, copies: int = 1, uses: int = 1
) -> Iterator[Matrix]:
    hidden = hidden_width(width, ratio, config.activation)
    for _ in range(2 if config.activation == "swiglu" else 1):
        yield Matrix(width, hidden, rows, config.bias, copies, uses)
    yield Matrix(hidden, width, rows, config.bias, copies, uses)


def _vector_mlp(features: int, width: int, rows: str) -> Iterator[Matrix]:
    yield Matrix(features, width, rows)
    yield Matrix(width, width, rows)


def _refiner(config: MMDiTConfig, name: str) -> Iterator[Matrix]:
    stream, width = config.streams[name], config.stream_width(name)
    if not stream.refiner_blocks:
        return
    rows, inner = f"tokens/{name}", config.num_heads * config.dim_of_head
    hidden = round(config.mlp_ratio * width)
    yield from _vector_mlp(NUM_FEATURES, width, "levels")
    yield from _vector_mlp(stream.in_channels, width, "segments")
    for _ in range(stream.refiner_blocks):
        for _ in range(3):
            yield Matrix(width, inner, rows)
        yield Matrix(inner, width, rows)
        yield Matrix(width, hidden, rows)
        yield Matrix(hidden, width, rows)
        yield Matrix(width, 2 * width, "levels")


def _norm_parameters(config: MMDiTConfig) -> int:
    """Weights of norms, which cost no matrix product."""
    total = 0
    has_qk_norm, has_rms = config.qk_norm == "rms", config.block_norm == "rms"
    per_head = 2 * config.dim_of_head if has_qk_norm else 0
    for name, stream in config.streams.items():
        width = config.stream_width(name)
        total += stream.refiner_blocks * 4 * width
        for index in range(config.num_double_blocks):
            branches = 1 if config.is_last(name, index) else 2
            posts = branches if config.sandwich_norm and branches == 2 else 0
            total += per_head + (branches * width if has_rms else 0) + posts * width
    if config.num_single_blocks:
        width = config.stream_width(next(iter(config.streams)))
        norms = has_rms + config.sandwich_norm
        total += config.num_single_blocks * (per_head + norms * width)
    return total
