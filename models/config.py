"""What a model is made of: the config space that spans SD3, FLUX, HunyuanVideo and their like."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kinodit.models.errors import ConfigError
from kinodit.models.mlp import Activation, hidden_width
from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.rope import RopeConfig

SINGLE = "all"
"""Name of the experts of single blocks, which see the tokens of all streams."""


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
    refiner_blocks: self-attention blocks within the stream before the joint ones (HunyuanVideo's
                    text token refiner)
    """

    in_channels: int
    output: bool = True
    out_channels: int | None = None
    width: int | None = None
    position: Literal["rope", "sincos_2d", "none"] = "rope"
    position_scale: float = 1.0
    refiner_blocks: int = 0

    def __post_init__(self) -> None:
        if self.in_channels < 1 or self.refiner_blocks < 0:
            raise ConfigError(
                f"a stream needs in_channels of at least 1 and refiner_blocks of at least 0, found "
                f"{self.in_channels} and {self.refiner_blocks}"
            )


@dataclass(frozen=True)
class ConditionConfig:
    """A condition vector of each segment that joins the timestep embedding.

    kind: "vector" goes through an MLP; "scalar" (guidance of a distilled model, `dim` 1) is turned
          into sine features like a timestep first.
    """

    dim: int
    kind: Literal["vector", "scalar"] = "vector"

    def __post_init__(self) -> None:
        if self.dim < 1 or (self.kind == "scalar" and self.dim != 1):
            raise ConfigError(f"a {self.kind} condition cannot have dim {self.dim}")


@dataclass(frozen=True)
class MMDiTConfig:
    """A multi-modal diffusion transformer.

    streams:           name -> stream, in the order of the joint sequence
    conditions:        name -> condition vector that the batch must bring
    width:             d of every stream that does not say otherwise
    num_heads:         query heads; their space (num_heads * head_dim) is shared by all streams
    head_dim:          None: width / num_heads
    num_kv_heads:      key/value heads (grouped-query attention); None: num_heads
    num_double_blocks: joint blocks, each stream with weights of its own
    num_single_blocks: blocks after them with one set of weights for all tokens; equal widths only
    mlp_ratio:         hidden width of an MLP over its width (two thirds of it when gated)
    activation:        of the MLPs
    qk_norm:           RMSNorm of queries and keys per head, or none
    qkv_bias, bias:    biases of the q, k, v projections; of all other linear layers in blocks
    norm_eps:          epsilon of all norms
    block_norm:        norm before a branch: LayerNorm without weights, or RMSNorm with
    sandwich_norm:     also an RMSNorm after each branch (Next-DiT, arXiv 2406.18583, section 2.1)
    modulation:        "shift_scale_gate" is adaLN-Zero; "scale_gate" has no shift, and its gates
                       go through tanh (Next-DiT)
    modulation_rank:   0: a full matrix per block; r > 0: a rank-r product per block plus one full
                       matrix that all blocks share (adaLN-LoRA, FiTv2, arXiv 2410.13925)
    condition_width:   c; None: width
    rope:              how positions become rotary angles
    experts:           stream -> experts in place of its feed-forwards in double blocks; "all" ->
                       in place of those of single blocks
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
    block_norm: Literal["layer", "rms"] = "layer"
    sandwich_norm: bool = False
    modulation: Literal["shift_scale_gate", "scale_gate"] = "shift_scale_gate"
    modulation_rank: int = 0
    condition_width: int | None = None
    rope: RopeConfig = field(default_factory=RopeConfig)
    experts: dict[str, ExpertsConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.width, self.num_heads, self.kv_heads) < 1:
            raise ConfigError(
                f"model.width = {self.width}, model.num_heads = {self.num_heads} and "
                f"model.num_kv_heads = {self.kv_heads} must be at least 1"
            )
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
        if self.num_double_blocks + self.num_single_blocks < 1:
            raise ConfigError(
                f"model.num_double_blocks = {self.num_double_blocks} and model.num_single_blocks "
                f"= {self.num_single_blocks}: a model needs at least one block"
            )
        if any(stream.position == "rope" for stream in self.streams.values()):
            if self.dim_of_head % 2:
                raise ConfigError(
                    f"the head dim {self.dim_of_head} is odd, but rotary positions turn pairs of "
                    "channels: change model.width, model.num_heads or model.head_dim"
                )
            self.rope.split(self.dim_of_head)
        widths = {self.stream_width(name) for name in self.streams}
        if self.num_single_blocks and len(widths) > 1:
            raise ConfigError(
                f"model.num_single_blocks = {self.num_single_blocks} needs streams of one width, "
                f"found widths {sorted(widths)}: use double blocks only, or equal widths"
            )
        for name, stream in self.streams.items():
            if stream.position == "sincos_2d" and self.stream_width(name) % 4:
                raise ConfigError(
                    f"stream {name!r} has width {self.stream_width(name)}, but sincos_2d needs a "
                    "multiple of 4"
                )
        for name, experts in self.experts.items():
            self._check_experts(name, experts)

    def _check_experts(self, name: str, experts: ExpertsConfig) -> None:
        if name != SINGLE and name not in self.streams:
            raise ConfigError(
                f"model.experts.{name}: there is no such stream; there are {sorted(self.streams)}, "
                f"and {SINGLE!r} for the single blocks"
            )
        count = self.num_single_blocks if name == SINGLE else self.num_double_blocks
        able = [i for i in range(count) if name == SINGLE or not self.is_last(name, i)]
        wrong = sorted(set(experts.blocks) - set(able))
        if wrong or not able:
            raise ConfigError(
                f"model.experts.{name}.blocks = {list(experts.blocks)}: feed-forwards that experts "
                f"can stand for are in blocks {able}: name some of these, or leave "
                f"model.experts.{name} out"
            )
        if experts.router.kind == "modality" and (
            name != SINGLE or experts.num_experts != len(self.streams)
        ):
            raise ConfigError(
                f"model.experts.{name}: router.kind = modality is for experts.{SINGLE} with one "
                f"expert for each of the {len(self.streams)} streams; in double blocks each stream "
                "has experts of its own; set router.kind = token"
            )

    def experts_in(self, name: str, index: int) -> ExpertsConfig | None:
        """The experts of stream `name` in double block `index`, or of single block `index`."""
        experts = self.experts.get(name)
        return experts if experts is not None and experts.is_in(index) else None

    @property
    def dim_of_head(self) -> int:
        """Head dim D."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def width_of_condition(self) -> int:
        """Width c of the condition."""
        return self.width if self.condition_width is None else self.condition_width

    @property
    def parts_per_branch(self) -> int:
        """Modulation vectors of one branch, its gate included."""
        return 3 if self.modulation == "shift_scale_gate" else 2

    def stream_width(self, name: str) -> int:
        """Width d of a stream."""
        width = self.streams[name].width
        return self.width if width is None else width

    def out_channels(self, name: str) -> int:
        """Channels that the head of a stream predicts."""
        stream = self.streams[name]
        return stream.in_channels if stream.out_channels is None else stream.out_channels

    def hidden(self, width: int) -> int:
        """Hidden width of an MLP in a block of `width`."""
        return hidden_width(width, self.mlp_ratio, self.activation)

    def is_last(self, name: str, index: int) -> bool:
        """Whether double block `index` is the last thing that a stream without output enters.

        There the stream gives keys and values and nothing after that is used, so nothing after
        that exists (SD3's `pre_only`).
        """
        is_final = index == self.num_double_blocks - 1 and self.num_single_blocks == 0
        return is_final and not self.streams[name].output
