"""The model: N streams of tokens, joint blocks, single blocks, a head per output stream.

Shape legend: N tokens of one stream, J tokens of all streams (stream-major), C channels of a
token, d width, c width of the condition, K rows of the noise-level table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinodit.models.attention import AttentionOp, attend
from kinodit.models.block import JointBlock, SingleBlock
from kinodit.models.config import ConditionConfig, MMDiTConfig, StreamConfig
from kinodit.models.context import ALL, Context, Rotary
from kinodit.models.embed import ConditionEmbed, StreamEmbed, timestep_features
from kinodit.models.errors import ConfigError
from kinodit.models.exchange import Exchange, Parts, Spot
from kinodit.models.modulation import AdaNorm, Modulation
from kinodit.models.moe.experts import ExpertOp, apply_experts
from kinodit.models.moe.layer import moe_layers
from kinodit.models.moe.prior import task_levels
from kinodit.models.random import generator
from kinodit.models.rope import rotary_table
from kinodit.models.tokens import TokenBatch

__all__ = ["ConditionConfig", "MMDiT", "MMDiTConfig", "StreamConfig"]


class Head(nn.Module):
    """Modulated norm and the projection from a stream's width to its output channels."""

    def __init__(self, name: str, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.stream_width(name)
        has_shift = config.modulation == "shift_scale_gate"
        self.modulation = Modulation(
            config.width_of_condition, width, 1, has_shift=has_shift, has_gate=False
        )
        self.prenorm = AdaNorm(width, config.norm_eps, "layer")
        self.linear = nn.Linear(width, config.out_channels(name))

    def forward(self, x: Tensor, condition: Tensor, level: Tensor) -> Tensor:
        """`x` [N, d] -> [N, C]."""
        (rows,) = self.modulation(condition)
        out: Tensor = self.linear(self.prenorm(x, rows, level))
        return out


class MMDiT(nn.Module):
    """Predicts, for every stream with a head, C numbers per token.

    `attend` may be set to another op of the same signature, and `exchange` to what processes that
    share the model do at its seams; every block uses them. So it is with `apply_experts`.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        outputs = [name for name, stream in config.streams.items() if stream.output]
        if not outputs:
            raise ConfigError(
                f"model.streams = {sorted(config.streams)}: at least one stream with output = true "
                "is needed"
            )
        self.config = config
        self.attend: AttentionOp = attend
        self.exchange: Exchange | None = None
        self.apply_experts: ExpertOp = apply_experts
        routers = [experts.router for experts in config.experts.values()]
        self._routes_by_timestep = any(router.kind == "timestep" for router in routers)
        self._has_prior = any(router.balance == "prior" for router in routers)
        self.embeds = nn.ModuleDict({name: StreamEmbed(name, config) for name in config.streams})
        self.condition = ConditionEmbed(config)
        self.shared_modulation = nn.ModuleDict(_shared_modulation(config))
        self.joint_blocks = nn.ModuleList(
            JointBlock(config, index) for index in range(config.num_double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(config, index) for index in range(config.num_single_blocks)
        )
        self.heads = nn.ModuleDict({name: Head(name, config) for name in outputs})
        for name, layer in moe_layers(self).items():
            layer.router.key = int(generator("router", name).integers(2**62))

    def forward(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Outputs [N, C] of every stream with a head, in the dtype of the weights.

        `batch.modalities` has the config's streams in the config's order; a stream may have no
        tokens, and then every module still runs, on zero tokens.
        """
        # Positions and times are computed in at least float32, whatever the weights are in.
        dtype = torch.promote_types(self.condition.time.input.weight.dtype, torch.float32)
        x: dict[str, Tensor] = {}
        for name in self.config.streams:
            x[name] = self.embeds[name](batch.modalities[name], batch, dtype, self.exchange)
        context = self._context(batch, dtype)
        for block in self.joint_blocks:
            x = block(x, context)
        if self.single_blocks:
            x = self._run_single_blocks(x, context.merged())
        return {
            name: head(x[name], context.condition, context.level[name])
            for name, head in self.heads.items()
        }

    def _context(self, batch: TokenBatch, dtype: torch.dtype) -> Context:
        """What all blocks see; positions and times are computed in `dtype`."""
        rotary: dict[str, Rotary] = {}
        levels_seen: dict[str, Tensor] = {}
        for name, stream in self.config.streams.items():
            tokens = batch.modalities[name]
            spot = Spot(tokens.position, tokens.level)
            if self.exchange is not None:
                spot = self.exchange.seen(name, batch)
            levels_seen[name] = spot.level
            rotary[name] = None
            if stream.position == "rope":
                head_dim = self.config.dim_of_head
                rotary[name] = rotary_table(self.config.rope, head_dim, *spot, batch.level_t, dtype)
        embedded, time = self.condition(batch, dtype)
        condition = F.silu(embedded)
        shared: Parts = {name: rows(condition) for name, rows in self.shared_modulation.items()}
        if self.exchange is not None and shared:
            shared = self.exchange.join(shared)
        return Context(
            condition=condition,
            shared=shared,
            level={name: tokens.level for name, tokens in batch.modalities.items()},
            num_seen={name: len(level) for name, level in levels_seen.items()},
            rotary=rotary,
            layout=batch.layout,
            attend=self.attend,
            exchange=self.exchange,
            level_t=batch.level_t,
            level_segment=batch.level_segment,
            num_segments=batch.num_segments,
            time=F.silu(time) if self._routes_by_timestep else None,
            tasks=self._tasks(batch, dtype),
            draws=batch.draws,
            levels_seen=levels_seen,
            apply_experts=self.apply_experts,
        )

    @torch.no_grad()
    def _tasks(self, batch: TokenBatch, dtype: torch.dtype) -> Tensor | None:
        """[G, c], see `Context.tasks`."""
        if not self._has_prior or batch.draws is None:
            return None
        levels = task_levels(batch.level_t.device)
        return F.silu(self.condition.time(timestep_features(levels, dtype)))

    def _run_single_blocks(self, x: dict[str, Tensor], context: Context) -> dict[str, Tensor]:
        joint = torch.cat(list(x.values()))
        for block in self.single_blocks:
            joint = block(joint, context)
        sizes = [part.shape[0] for part in x.values()]
        return dict(zip(x, torch.split(joint, sizes), strict=True))


def _shared_modulation(config: MMDiTConfig) -> dict[str, nn.Module]:
    """The full-rank part of adaLN-LoRA, one per stream and one for all single blocks."""
    if not config.modulation_rank:
        return {}
    parts = config.parts_per_branch
    shared: dict[str, nn.Module] = {}
    if config.num_double_blocks:
        for name in config.streams:
            width = config.stream_width(name)
            shared[name] = nn.Linear(config.width_of_condition, 2 * parts * width, bias=False)
    if config.num_single_blocks:
        width = config.stream_width(next(iter(config.streams)))
        shared[ALL] = nn.Linear(config.width_of_condition, parts * width, bias=False)
    return shared
