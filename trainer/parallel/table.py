"""The table of shardings: which parameter lies how on the ranks of the tensor-parallel axis.

A row names modules by a pattern (`*` stands for one part of a dotted name) and gives them a style;
nothing here knows a backend. The table is strict: a row that matches no module, a parameter that no
row matches or two do, and a parameter that its row cannot split are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from torch import nn

from kinodit.models.config import SINGLE, MMDiTConfig
from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.models.moe.config import ExpertsConfig

Style = Literal["column", "row", "stored", "stored_in", "whole", "experts"]
"""How a module's parameters lie on the ranks, and what its forward sees of them.

column:    outputs split: the forward sees its part of weight and bias
row:       inputs split: the forward sees its part of the weight, and gives a part of the sum
stored:    split by outputs at rest, put together whenever the forward looks at the weight
stored_in: the same, split by inputs
whole:     on every rank; small, or not a matrix
experts:   stacked weights, each expert's hidden units split: outputs of up and gate, inputs of down
"""


class TableError(LookupError):
    """A table that does not fit its model: a mistake in this code, not in a recipe."""


@dataclass(frozen=True)
class Row:
    """Modules whose name matches `pattern`, and their style."""

    pattern: str
    style: Style

    def matches(self, name: str) -> bool:
        """Whether the pattern names the module `name`."""
        return _compiled(self.pattern).fullmatch(name) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))


@dataclass(frozen=True)
class Split:
    """One parameter's way to lie. dim: the split dim, None if every rank has it whole.

    part:     the forward sees this rank's part; otherwise all of it
    summed:   the forward's results are summed over ranks, so each adds its fraction of this
    """

    dim: int | None
    part: bool
    summed: bool = False


SPLITS: dict[Style, dict[str, Split]] = {
    "column": {"weight": Split(0, part=True), "bias": Split(0, part=True)},
    "row": {"weight": Split(1, part=True), "bias": Split(None, part=False, summed=True)},
    "stored": {"weight": Split(0, part=False), "bias": Split(None, part=False)},
    "stored_in": {"weight": Split(1, part=False), "bias": Split(None, part=False)},
    "experts": {
        "up": Split(1, part=True),
        "gate": Split(1, part=True),
        "down": Split(2, part=True),
        "up_bias": Split(1, part=True),
        "gate_bias": Split(1, part=True),
        "down_bias": Split(None, part=False, summed=True),
    },
    "whole": dict.fromkeys(("weight", "bias", "hidden", "hidden_bias"), Split(None, part=False)),
}


def mmdit_table(config: MMDiTConfig) -> list[Row]:
    """The table of `MMDiT(config)`. Matrices of blocks are split; the others are stored split."""
    rows = [
        Row("embeds.*.linear", "stored"),
        Row("condition.time.*", "stored"),
        Row("heads.*.modulation.linear", "stored"),
        Row("heads.*.linear", "stored_in"),
    ]
    if config.conditions:
        rows.append(Row("condition.vectors.*.*", "stored"))
    if any(stream.refiner_blocks for stream in config.streams.values()):
        rows += _refiner_rows("embeds.*.refiner")
    if config.modulation_rank:
        rows.append(Row("shared_modulation.*", "column"))
    if config.num_double_blocks:
        block = "joint_blocks.*.streams.*"
        rows += _block_rows(block, config)
        for name in config.streams:
            able = [i for i in range(config.num_double_blocks) if not config.is_last(name, i)]
            found = [config.experts_in(name, index) for index in able]
            rows += _feed_forward_rows(f"joint_blocks.*.streams.{name}", config, found)
        for branch in ("attention", "mlp"):
            rows += _norm_rows(f"{block}.{branch}_", config)
    if config.num_single_blocks:
        rows += _block_rows("single_blocks.*", config)
        found = [config.experts_in(SINGLE, index) for index in range(config.num_single_blocks)]
        rows += _feed_forward_rows("single_blocks.*", config, found)
        rows += _norm_rows("single_blocks.*.", config)
    return rows


TABLES: dict[type[nn.Module], Callable[[MMDiTConfig], list[Row]]] = {MMDiT: mmdit_table}
"""Model family -> its table. A family of one's own is entered here, by its class."""


def table_of(model: MMDiT) -> list[Row]:
    """The table of a model: that of its class, or of the nearest class it derives from."""
    for family in type(model).__mro__:
        if family in TABLES:
            return TABLES[family](model.config)
    raise TableError(f"no table of shardings for {type(model).__name__}: add one to TABLES")


def _block_rows(block: str, config: MMDiTConfig) -> list[Row]:
    rows = [Row(f"{block}.attention.{name}", "column") for name in "qkv"]
    rows += [
        Row(f"{block}.attention.out", "row"),
        Row(f"{block}.modulation.linear", "column"),
    ]
    if config.modulation_rank:
        rows.append(Row(f"{block}.modulation.down", "stored_in"))
    if config.qk_norm == "rms":
        rows += [Row(f"{block}.attention.{name}_norm", "whole") for name in "qk"]
    return rows


def _feed_forward_rows(
    block: str, config: MMDiTConfig, found: Sequence[ExpertsConfig | None]
) -> list[Row]:
    """`found`: the experts of each of the blocks, None where there is one feed-forward."""
    rows = []
    if None in found:
        rows += _mlp_rows(f"{block}.mlp", config)
    experts = next((one for one in found if one is not None), None)
    if experts is not None:
        rows.append(Row(f"{block}.mlp.experts", "experts"))
        if experts.router.is_learned:
            rows.append(Row(f"{block}.mlp.router", "whole"))
        if experts.shared_ratio:
            rows += _mlp_rows(f"{block}.mlp.shared", config)
    return rows


def _mlp_rows(mlp: str, config: MMDiTConfig) -> list[Row]:
    rows = [Row(f"{mlp}.up", "column"), Row(f"{mlp}.down", "row")]
    if config.activation == "swiglu":
        rows.append(Row(f"{mlp}.gate", "column"))
    return rows


def _norm_rows(prefix: str, config: MMDiTConfig) -> list[Row]:
    rows = []
    if config.block_norm == "rms":
        rows.append(Row(f"{prefix}prenorm.norm", "whole"))
    if config.sandwich_norm:
        rows.append(Row(f"{prefix}postnorm", "whole"))
    return rows


def _refiner_rows(refiner: str) -> list[Row]:
    blocks = f"{refiner}.blocks.*"
    stored = ["time.*", "pooled.*"]
    stored += [f"blocks.*.{name}" for name in ("q", "k", "v", "out", "mlp.*", "modulation")]
    rows = [Row(f"{refiner}.{name}", "stored") for name in stored]
    return rows + [Row(f"{blocks}.{name}_norm", "whole") for name in ("attention", "mlp")]


def assign_splits(model: nn.Module, rows: Sequence[Row], degree: int) -> dict[str, Split]:
    """Parameter name -> how it lies on `degree` ranks.

    Raises:
        TableError: the table does not fit the model.
        ConfigError: `degree` does not divide a dim that has to be split.
    """
    found: dict[str, Split] = {}
    used: set[str] = set()
    splitting: set[str] = set()
    for name, module in model.named_modules():
        own = [key for key, value in module.named_parameters(recurse=False)]
        matching = [row for row in rows if row.matches(name)]
        if own and len(matching) != 1:
            patterns = ", ".join(row.pattern for row in matching) or "none"
            raise TableError(
                f"parameters {own} of module {name!r} must match one row of the table of "
                f"shardings; found: {patterns}"
            )
        if not own:
            continue
        row = matching[0]
        used.add(row.pattern)
        for key in own:
            whole_name = f"{name}.{key}" if name else key
            if key not in SPLITS[row.style]:
                raise TableError(
                    f"{whole_name}: style {row.style!r} of row {row.pattern!r} says nothing of a "
                    f"parameter {key!r}, only of {', '.join(SPLITS[row.style])}"
                )
            split = SPLITS[row.style][key]
            _check(whole_name, tuple(module.get_parameter(key).shape), split, degree)
            found[whole_name] = split
            if split.dim is not None:
                splitting.add(row.pattern)
    unused = [row.pattern for row in rows if row.pattern not in used]
    if unused:
        raise TableError(f"rows of the table of shardings match no parameter: {unused}")
    idle = [row.pattern for row in rows if row.style != "whole" and row.pattern not in splitting]
    if idle:
        raise TableError(
            f"rows of the table of shardings split nothing of what they match: {idle}; style "
            "'whole' says that this is meant"
        )
    return found


def _check(name: str, shape: tuple[int, ...], split: Split, degree: int) -> None:
    if split.dim is None:
        return
    if split.dim >= len(shape):
        raise TableError(f"{name} has shape {shape}, but its row splits dim {split.dim}")
    if shape[split.dim] % degree:
        raise ConfigError(
            f"parallel.tp={degree} does not divide {shape[split.dim]}, dim {split.dim} of {name} "
            f"{list(shape)}: change parallel.tp or the model's width, heads or mlp_ratio"
        )


def check_heads(config: MMDiTConfig, tp: int, ulysses: int) -> None:
    """Whether heads can be split over tp ranks, and then exchanged among `ulysses` ranks.

    Raises:
        ConfigError: with the numbers.
    """
    num_heads, num_kv = config.num_heads, config.kv_heads
    if num_heads % tp or num_kv % tp:
        raise ConfigError(
            f"parallel.tp={tp} must divide model.num_heads = {num_heads} and the {num_kv} "
            "key/value heads, which it splits: change parallel.tp or the heads"
        )
    num_heads, num_kv = num_heads // tp, num_kv // tp
    if num_heads % ulysses or (num_kv % ulysses and ulysses % num_kv):
        held = f" of {tp} tp ranks" if tp > 1 else ""
        raise ConfigError(
            f"parallel.cp / parallel.ring = {ulysses} ranks exchange heads; it must divide the "
            f"{num_heads} heads{held}, and divide or be a multiple of the {num_kv} key/value "
            "heads: raise parallel.ring, or change the heads"
        )
