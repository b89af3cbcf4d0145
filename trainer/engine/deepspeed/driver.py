"""DeepSpeed's engine with two of its choices made otherwise."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch


def driver_class(library: Any, params_dtype: torch.dtype) -> Any:
    """A class like `deepspeed.DeepSpeedEngine` for parameters that are kept in `params_dtype`."""
    zero_engine = _zero_engine(library)
    return _double_engine(zero_engine) if params_dtype == torch.float64 else zero_engine


def _zero_engine(library: Any) -> Any:
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION

    class ZeroOnly(library.DeepSpeedEngine):  # type: ignore[misc]
        """Stage 1 in bfloat16 through ZeRO as well, not through an optimizer of another layout."""

        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
            kind: str = ZERO_OPTIMIZATION
            return kind

    return ZeroOnly


def _double_engine(zero_engine: Any) -> Any:
    """The engine in float64, for proofs: DeepSpeed's code with its constant float32 replaced.

    DeepSpeed keeps float32 masters whatever the model is made of. Which sums go over which ranks
    does not depend on the format, and shows to the last digit in this one.
    """
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    class Double(zero_engine):  # type: ignore[misc]
        """See above."""

        def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
            """Of the model and of accumulated gradients."""
            return torch.float64, torch.float64

        @property
        def communication_data_type(self) -> torch.dtype:
            """Of reduced gradients."""
            return torch.float64

        def _configure_zero_optimizer(self, optimizer: Any) -> Any:
            masters = mock.patch.object(
                ZeROOptimizer, "_configure_master_weights", lambda *_, **__: torch.float64
            )
            with masters:
                return super()._configure_zero_optimizer(optimizer)

    return Double
