"""megatron-core's data parallelism: whole parameters, state in parts, overlapped messages.

Its DistributedDataParallel sums buckets of gradients over the dp_shard and cp ranks, each rank a
part; its DistributedOptimizer updates those parts and gathers parameters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from kinodit.models.tokens import TokenBatch
from kinodit.trainer.engine.base import Forward, Predictions
from kinodit.trainer.engine.config import MegatronConfig
from kinodit.trainer.engine.evaluating import evaluating
from kinodit.trainer.engine.megatron.core import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    DistributedOptimizer,
    OptimizerConfig,
    ProcessGroupCollection,
    TransformerConfig,
)
from kinodit.trainer.engine.megatron.elsewhere import named_as_cuda
from kinodit.trainer.engine.megatron.stretches import Stretches
from kinodit.trainer.engine.megatron.te import float8_context
from kinodit.trainer.engine.megatron.te_attention import use_kernels
from kinodit.trainer.engine.partitioned import PartitionedEngine, allocate, own_buffers
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.engine.shells import Shells
from kinodit.trainer.optim import build_optimizer
from kinodit.trainer.optim.adamw import AdamW
from kinodit.trainer.parallel.apply import PrecisionConfig, parallelize
from kinodit.trainer.parallel.deferred import Values
from kinodit.trainer.parallel.mesh import Mesh
from kinodit.trainer.parallel.sharing import SharedForward


class DistributedEngine(PartitionedEngine):
    """Implements `Engine` by a DistributedDataParallel and what it left on this rank."""

    def __init__(
        self,
        parallel: DistributedDataParallel,
        optimizer: AdamW,
        stretches: Stretches,
        shells: Shells,
        mesh: Mesh,
        precision: PrecisionConfig,
    ) -> None:
        super().__init__(parallel.module, optimizer, stretches, [shells], mesh)
        self._parallel, self._stretches = parallel, stretches
        self._dtype = precision.compute_dtype
        self._computing = float8_context(precision.float8)
        self._shared = SharedForward(self._forward, mesh) if mesh.place.is_cut else self._forward

    def forward_backward(
        self, batch: TokenBatch, loss: Callable[[Predictions], Tensor], *, last: bool
    ) -> Tensor:
        """See `Engine`."""
        with nullcontext() if last else self._parallel.no_sync():
            value = loss(self._forward(batch))
            value.backward()
        if last:
            self._stretches.finish()
            self._parallel.finish_grad_sync()
            self._sum_whole_gradients()
        return value.detach()

    def step(self, lr: float) -> None:
        """See `Engine`."""
        self._optimizer.set_lr(lr)
        self._stretches.update()

    @contextmanager
    def inference(self) -> Iterator[Forward]:
        """See `Engine`."""
        with evaluating(self.model):
            yield self._shared

    def _forward(self, batch: TokenBatch) -> Predictions:
        batch = batch.in_dtype(self._dtype)
        with self._computing():
            predictions: Predictions = self._parallel(batch)
        return predictions


def build(model: nn.Module, values: Values, mesh: Mesh, wish: Wish) -> DistributedEngine:
    """See `build_engine`; `mesh` has several ranks.

    Masters start from the values in their own precision, whatever the model computes in.
    """
    assert isinstance(wish.engine, MegatronConfig) and mesh.device_mesh is not None
    precision, device = wish.precision, mesh.device
    whole = copy.deepcopy(model)
    parallelize(whole, mesh, wish.parallel, precision, wish.remat, compile_blocks=False)
    shells = Shells.of(whole, mesh.device_mesh.get_group("dp_shard_cp"))
    del whole
    unsharded = replace(mesh, device_mesh=None)
    parallelize(model, unsharded, wish.parallel, precision, wish.remat, compile_blocks=False)
    use_kernels(model, wish.engine)
    own_buffers(model, device, precision.params_dtype)
    allocate(model, device, precision.compute_dtype)
    optimizer = build_optimizer(wish.optim, model)
    assert isinstance(optimizer, AdamW), "refused before"
    # Its own calls, by names that torch has given up.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated")
    # Order of modules and of parameters differ inside a block; it costs overlap there alone.
    warnings.filterwarnings("ignore", message="The next bucket's parameter all-gather operation")
    with named_as_cuda(device, precision.params_dtype):
        parallel = _parallel(model, mesh, wish.engine, precision)
        with torch.no_grad():
            distributed = DistributedOptimizer(
                optimizer=optimizer.adamw,
                config=OptimizerConfig(
                    optimizer="adam",
                    lr=wish.optim.lr,
                    bf16=precision.compute_dtype == torch.bfloat16,
                    params_dtype=precision.compute_dtype,
                    use_distributed_optimizer=True,
                    overlap_param_gather=parallel.ddp_config.overlap_param_gather,
                    clip_grad=0.0,
                ),
                grad_scaler=None,
                init_state_fn=None,
                model_chunks=[parallel],
                per_model_buffers={0: parallel.buffers},
                data_parallel_group=parallel.dp_cp_group,
                data_parallel_group_gloo=None,
                data_parallel_group_idx=0,
                distributed_optimizer_instance_id=0,
            )
    stretches = Stretches(parallel, distributed, model, device, precision.params_dtype)
    engine = DistributedEngine(parallel, optimizer, stretches, shells, mesh, precision)
    engine.start_from(values)
    return engine


def _parallel(
    model: nn.Module, mesh: Mesh, engine: MegatronConfig, precision: PrecisionConfig
) -> DistributedDataParallel:
    """The model in megatron-core's data parallelism: gradients are sums, in at least float32."""
    assert mesh.device_mesh is not None
    partners, alone = (mesh.device_mesh.get_group(axis) for axis in ("dp_shard_cp", "dp_replicate"))
    groups = ProcessGroupCollection(
        dp=partners,
        dp_cp=partners,
        # There are no parameters of theirs.
        expt_dp=partners,
        tp=alone if mesh.tp_mesh is None else mesh.tp_mesh.get_group(),
        pp=alone,
        ep=alone,
    )
    settings = DistributedDataParallelConfig(
        # It knows float32 and the parameters' format, which is float64 in proofs alone.
        grad_reduce_in_fp32=precision.params_dtype == torch.float32,
        use_distributed_optimizer=True,
        overlap_grad_reduce=engine.overlap,
        overlap_param_gather=engine.overlap,
        bucket_size=engine.bucket_numel or None,
    )
    told = TransformerConfig(
        num_layers=1,
        hidden_size=1,
        num_attention_heads=1,
        calculate_per_token_loss=True,
        cuda_graph_scope=[],
    )
    return DistributedDataParallel(told, settings, model, pg_collection=groups)
