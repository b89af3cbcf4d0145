"""The one place where a model meets its mesh, and the order in which that happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from kinodit.models.attention import fits_flash
from kinodit.models.block import JointBlock, SingleBlock
from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiT
from kinodit.trainer.parallel.context import ContextAttention
from kinodit.trainer.parallel.expert import ExpertExchange, deal_experts
from kinodit.trainer.parallel.mesh import Mesh, ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig, apply_remat
from kinodit.trainer.parallel.shard import shard
from kinodit.trainer.parallel.table import check_heads, table_of
from kinodit.trainer.parallel.tensor import CopiedTokens, TokenExchange, split_model

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats; float64 is for proofs.

    params:  of parameters, gradients and optimizer state
    compute: of forward and backward
    reduce:  of sums of gradients over ranks
    float8:  products of blocks' matrices in float8, with one scale for a tensor or for each row;
             needs hardware that has it
    """

    params: Literal["float32", "float64"] = "float32"
    compute: Literal["bfloat16", "float32", "float64"] = "float32"
    reduce: Literal["float32", "float64", "bfloat16"] = "float32"
    float8: Literal["none", "tensorwise", "rowwise"] = "none"

    @property
    def params_dtype(self) -> torch.dtype:
        """dtype of parameters, gradients and optimizer state."""
        return DTYPES[self.params]

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of forward and backward."""
        return DTYPES[self.compute]

    @property
    def reduce_dtype(self) -> torch.dtype:
        """dtype in which gradients are summed over ranks."""
        return DTYPES[self.reduce]


def model_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of `model` in order: the units of recomputation, compilation and sharding."""
    return [part for part in model.modules() if isinstance(part, JointBlock | SingleBlock)]


@dataclass(frozen=True)
class Layout:
    """All that a step of `parallelize` may look at."""

    mesh: Mesh
    parallel: ParallelConfig
    precision: PrecisionConfig
    remat: RematConfig
    compile_blocks: bool


LayoutStep = Callable[[nn.Module, Layout], None]


def split_matrices(model: nn.Module, layout: Layout) -> None:
    """Tensor parallelism, by the table of the model's family."""
    if layout.mesh.tp_mesh is not None:
        assert isinstance(model, MMDiT)
        split_model(model, table_of(model), layout.mesh.tp_mesh)


def deal_out_experts(model: nn.Module, layout: Layout) -> None:
    """Expert parallelism, over what tensor parallelism left of each expert."""
    mesh = layout.mesh.expert_mesh
    if mesh is not None:
        assert isinstance(model, MMDiT)
        deal_experts(model, mesh)
        model.apply_experts = ExpertExchange(mesh.get_group("ep"))


def share_tokens(model: nn.Module, layout: Layout) -> None:
    """Context parallelism, and the tokens between tensor-parallel matrices."""
    mesh = layout.mesh
    if mesh.place.is_cut:
        assert isinstance(model, MMDiT)
        check_heads(model.config, layout.parallel.tp, layout.parallel.ulysses)
        if mesh.ring is not None:
            check_ring(model.config.dim_of_head, layout.precision.compute_dtype, mesh.device)
        model.attend = ContextAttention(mesh.place, mesh.heads, mesh.ring)
        exchange = TokenExchange(mesh.tp_mesh.get_group() if mesh.tp_mesh else None, mesh.pack)
        copied = mesh.place.copies > 1
        model.exchange = CopiedTokens(exchange) if copied else exchange


def check_ring(head_dim: int, compute_dtype: torch.dtype, device: torch.device) -> None:
    """Whether `device` has a kernel for a ring: it must tell the log-sum-exp of its softmax.

    Raises:
        ConfigError: with the numbers.
    """
    if device.type == "cuda" and not fits_flash(compute_dtype, head_dim):
        raise ConfigError(
            f"parallel.ring on CUDA needs precision.compute=bfloat16 and a head dim in steps of 8 "
            f"up to 256; found {str(compute_dtype).partition('.')[2]} and {head_dim}: change them, "
            "or set parallel.ring=1"
        )


def recompute(model: nn.Module, layout: Layout) -> None:
    """Activation checkpointing."""
    apply_remat(layout.remat, model_blocks(model))


def compile_blocks(model: nn.Module, layout: Layout) -> None:
    """`torch.compile`, block by block."""
    for block in model_blocks(model) if layout.compile_blocks else ():
        block.compile()


def shard_parameters(model: nn.Module, layout: Layout) -> None:
    """FSDP2 over what is left of each parameter."""
    if layout.mesh.device_mesh is not None:
        precision = layout.precision
        shard(
            model,
            layout.mesh.device_mesh,
            model_blocks(model),
            precision.compute_dtype,
            precision.reduce_dtype,
            layout.parallel,
            layout.mesh.expert_mesh,
        )


STEPS: tuple[LayoutStep, ...] = (
    share_tokens,
    split_matrices,
    deal_out_experts,
    recompute,
    compile_blocks,
    shard_parameters,
)
"""The one order in which a model is laid out. Heads are checked before matrices are split."""


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    remat: RematConfig,
    compile_blocks: bool,
) -> None:
    """Lay out `model` over `mesh`, in place, by STEPS. In one process it stays a plain module.

    Raises:
        ConfigError: the model cannot be shared out as the mesh says.
    """
    if parallel.cpu_offload and (mesh.device.type == "cpu" or mesh.world_size == 1):
        raise ConfigError(
            f"parallel.cpu_offload=true on {mesh.world_size} process(es) and {mesh.device.type}: "
            "there is nowhere to offload from; it needs accelerators and a sharded run"
        )
    model.to(dtype=precision.params_dtype)
    layout = Layout(mesh, parallel, precision, remat, compile_blocks)
    for step in STEPS:
        step(model, layout)
