"""The names of megatron-core that are used here, of the range of versions that pyproject.toml has.

On import it warns of faster kernels that are not installed; none of them is used.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer_config import OptimizerConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        linear_with_frozen_weight,
        linear_with_grad_accumulation_and_async_allreduce,
    )
    from megatron.core.transformer.moe import grouped_gemm_util, token_dispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = [
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "DistributedOptimizer",
    "HyperCommGrid",
    "ModelParallelConfig",
    "OptimizerConfig",
    "ProcessGroupCollection",
    "RowParallelLinear",
    "TransformerConfig",
    "grouped_gemm_util",
    "linear_with_frozen_weight",
    "linear_with_grad_accumulation_and_async_allreduce",
    "token_dispatcher",
]
