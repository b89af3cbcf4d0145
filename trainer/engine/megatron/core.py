"""The names of megatron-core that are used here, of the range of versions that pyproject.toml has.

On import it warns of faster kernels that are not installed; none of them is used.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        linear_with_frozen_weight,
        linear_with_grad_accumulation_and_async_allreduce,
    )

__all__ = [
    "ColumnParallelLinear",
    "HyperCommGrid",
    "ModelParallelConfig",
    "ProcessGroupCollection",
    "RowParallelLinear",
    "linear_with_frozen_weight",
    "linear_with_grad_accumulation_and_async_allreduce",
]
