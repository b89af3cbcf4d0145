"""The model: N streams of tokens, joint blocks, single blocks, a head per output stream.

Shape legend: N tokens of one stream, J tokens of all streams (stream-major), C channels of a
token, d width, c width of the condition, K rows of the noise-level table, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinodit.models.attention import AttentionOp, attend
from kinodit.models.block import BlockOptions, Context, JointBlock, Rotary, SingleBlock
from kinodit.models.embed import NUM_FREQUENCIES, VectorMLP, timestep_features
from kinodit.models.errors import ConfigError
from kinodit.models.mlp import Activation, hidden_width
from kinodit.models.modulation import Modulation, modulated_norm
from kinodit.models.rope import RopeConfig, rotary_table, sincos_2d
from kinodit.models.tokens import TokenBatch


@dataclass(frozen=True)
class StreamConfig:
    """One modality's tokens.

    in_channels:    C, channels of a token as the batch holds it (patchified)
    output:         whether the stream has a head; a text stream has none
    out_channels:   channels that the head predicts; None: as many as come in
    width:          width of the stream; None: the model's
    position:       what tells where a token is: rotary angles in attention, SD3's sine table added
                    to the embedding, or nothing
    position_scale: multiplies row and column for `sincos_2d`
    """

    in_channels: int
    output: bool = True
    out_channels: int | None = None
    width: int | None = None
    position: Literal["rope", "sincos_2d", "none"] = "rope"
    position_scale: float = 1.0


@dataclass(frozen=True)
class ConditionConfig:
    """A condition vector of each segment that joins the timestep embedding.

    kind: "vector" goes through an MLP; "scalar" (guidance of a distilled model, `dim` 1) is turned
          into sine features like a timestep first.
    """

    dim: int
    kind: Literal["vector", "scalar"] = "vector"

    def __post_init__(self) -> None:
        if self.kind == "scalar" and self.dim != 1:
            raise ConfigError(f"a scalar condition has dim 1, not {self.dim}")


@dataclass(frozen=True)
class MMDiTConfig:
    """A multi-modal diffusion transformer.

    streams:           name -> stream, in the order of the joint sequence
    conditions:        name -> condition vector that the batch must bring
    width:             d of every stream that does not say otherwise
    num_heads:         query heads; their space (num_heads * head_dim) is shared by all streams
    head_dim:          None: width / num_heads
    num_kv_heads:      key/value heads (GQA); None: num_heads
    num_double_blocks: joint blocks, each stream with weights of its own
    num_single_blocks: blocks after them with one set of weights for all tokens; equal widths only
    mlp_ratio:         hidden width of an MLP over its width (two thirds of it when gated)
    qk_norm:           RMSNorm of queries and keys per head
    qkv_bias, bias:    biases of the q, k, v projections; of all other linear layers in blocks
    """

    streams: dict[str, StreamConfig] = field(default_factory=dict)
    conditions: dict[str, ConditionConfig] = field(default_factory=dict)
    width: int = 256
    num_heads: int = 4
    head_dim: int | None = None
    num_kv_heads: int | None = None
    num_double_blocks: int = 4
    num_single_blocks: int = 0
    mlp_ratio: float = 4.0
    activation: Activation = "gelu_tanh"
    qk_norm: Literal["none", "rms"] = "rms"
    qkv_bias: bool = True
    bias: bool = True
    norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        if self.head_dim is None and self.width % self.num_heads:
            raise ConfigError(
                f"model.width = {self.width} does not divide into model.num_heads = "
                f"{self.num_heads}: change either, or set model.head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"model.num_heads = {self.num_heads} is not a multiple of model.num_kv_heads = "
                f"{self.num_kv_heads}: query heads share key/value heads in equal groups"
            )
        if any(stream.position == "rope" for stream in self.streams.values()):
            self.rope.split(self.dim_of_head)
        widths = {self.stream_width(name) for name in self.streams}
        if self.num_single_blocks and len(widths) > 1:
            raise ConfigError(
                f"model.num_single_blocks = {self.num_single_blocks} needs streams of one width, "
                f"found widths {sorted(widths)}: use double blocks only, or equal widths"
            )

    @property
    def dim_of_head(self) -> int:
        """Head dim D."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def stream_width(self, name: str) -> int:
        """Width d of a stream."""
        width = self.streams[name].width
        return self.width if width is None else width

    def block_options(self) -> BlockOptions:
        """What blocks need to know of this."""
        return BlockOptions(
            condition_width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim_of_head,
            qk_norm=self.qk_norm == "rms",
            qkv_bias=self.qkv_bias,
            bias=self.bias,
            activation=self.activation,
            norm_eps=self.norm_eps,
        )


class ConditionEmbed(nn.Module):
    """The condition c of each row of the noise-level table."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.kinds = {name: condition.kind for name, condition in config.conditions.items()}
        self.time = VectorMLP(NUM_FREQUENCIES, config.width)
        self.vectors = nn.ModuleDict(
            {
                name: VectorMLP(
                    NUM_FREQUENCIES if condition.kind == "scalar" else condition.dim, config.width
                )
                for name, condition in config.conditions.items()
            }
        )

    def forward(self, batch: TokenBatch, dtype: torch.dtype) -> Tensor:
        """[K, c], not activated; sine features are computed in `dtype`."""
        c_Kc: Tensor = self.time(timestep_features(batch.level_t, dtype))
        for name, embed in self.vectors.items():
            value = batch.conditions[name]
            if self.kinds[name] == "scalar":
                value = timestep_features(value[:, 0], dtype)
            c_Kc = c_Kc + embed(value)[batch.level_segment]
        return c_Kc


class Head(nn.Module):
    """Modulated norm and the projection from a stream's width to its output channels."""

    def __init__(self, condition_width: int, width: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.modulation = Modulation(condition_width, width, 2)
        self.linear = nn.Linear(width, out_channels)

    def forward(self, x: Tensor, condition: Tensor, level: Tensor) -> Tensor:
        """`x` [N, d] -> [N, C]."""
        shift, scale = self.modulation(condition)
        out: Tensor = self.linear(modulated_norm(x, shift, scale, level, self.eps))
        return out


class MMDiT(nn.Module):
    """Predicts, for every stream with a head, C numbers per token."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        if not config.streams:
            raise ConfigError("model.streams is empty: name at least one stream")
        self.config = config
        self.attend: AttentionOp = attend
        options = config.block_options()
        names = list(config.streams)
        widths = {name: config.stream_width(name) for name in names}
        hidden = {
            name: hidden_width(width, config.mlp_ratio, config.activation)
            for name, width in widths.items()
        }
        outputs = [name for name in names if config.streams[name].output]
        self.embeds = nn.ModuleDict(
            {name: nn.Linear(config.streams[name].in_channels, widths[name]) for name in names}
        )
        self.condition = ConditionEmbed(config)
        last = config.num_double_blocks - 1 if config.num_single_blocks == 0 else -1
        self.joint_blocks = nn.ModuleList(
            JointBlock(
                widths,
                hidden,
                options,
                frozenset(names).difference(outputs) if index == last else frozenset(),
            )
            for index in range(config.num_double_blocks)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(widths[names[0]], hidden[names[0]], options)
            for _ in range(config.num_single_blocks)
        )
        self.heads = nn.ModuleDict(
            {
                name: Head(
                    options.condition_width,
                    widths[name],
                    config.streams[name].out_channels or config.streams[name].in_channels,
                    config.norm_eps,
                )
                for name in outputs
            }
        )

    def forward(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Outputs [N, C] of every stream with a head, in the dtype of the weights.

        `batch.modalities` has the config's streams in the config's order; a stream may have no
        tokens, and then every module still runs, on zero tokens.
        """
        weight_dtype = self.condition.time.input.weight.dtype
        dtype = torch.promote_types(weight_dtype, torch.float32)
        condition = F.silu(self.condition(batch, dtype))
        x: dict[str, Tensor] = {}
        rotary: dict[str, Rotary] = {}
        for name, stream in self.config.streams.items():
            tokens = batch.modalities[name]
            x[name] = self.embeds[name](tokens.latents.to(weight_dtype))
            if stream.position == "sincos_2d":
                table = sincos_2d(tokens.position, x[name].shape[1], stream.position_scale, dtype)
                x[name] = x[name] + table.to(x[name].dtype)
            rotary[name] = None
            if stream.position == "rope":
                rotary[name] = rotary_table(
                    self.config.rope,
                    self.config.dim_of_head,
                    tokens.position,
                    tokens.level,
                    batch.level_t,
                    dtype,
                )
        level = {name: batch.modalities[name].level for name in x}
        context = Context(condition, level, rotary, batch.layout, self.attend)
        for block in self.joint_blocks:
            x = block(x, context)
        if self.single_blocks:
            merged = context.merged()
            joint = torch.cat(list(x.values()))
            for block in self.single_blocks:
                joint = block(joint, merged)
            sizes = [part.shape[0] for part in x.values()]
            x = dict(zip(x, torch.split(joint, sizes), strict=True))
        return {name: head(x[name], condition, level[name]) for name, head in self.heads.items()}
