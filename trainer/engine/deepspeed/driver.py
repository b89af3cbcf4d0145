"""DeepSpeed's engine with three of its choices made otherwise."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch


def driver_class(library: Any, params_dtype: torch.dtype) -> Any:
    """A class like `deepspeed.DeepSpeedEngine` for parameters that are kept in `params_dtype`."""
    zero_engine = _zero_engine(library)
    return _double_engine(zero_engine) if params_dtype == torch.float64 else zero_engine


def _zero_engine(library: Any) -> Any:
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    configure = DeepSpeedZeroOptimizer._configure_moe_settings

    def _for_any_format(self: Any) -> None:
        """Experts ask for partitions to be reduced, which formats of the twin are refused for."""
        chosen, self.reduce_scatter = self.reduce_scatter, True
        configure(self)
        self.reduce_scatter = chosen

    class ZeroOnly(library.DeepSpeedEngine):  # type: ignore[misc]
        """Stage 1 in bfloat16 through ZeRO as well, not through an optimizer of another layout.

        And parameters that were marked as experts' are taken for such.
        """

        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
            kind: str = ZERO_OPTIMIZATION
            return kind

        def _configure_distributed_model(self, model: Any) -> None:
            super()._configure_distributed_model(model)
            # It knows experts of its own modules alone. Stage 3 needs not know of any.
            self.has_moe_layers = any(is_moe_param(part) for part in model.parameters())

        def _configure_zero_optimizer(self, optimizer: Any) -> Any:
            if not self.has_moe_layers:
                return super()._configure_zero_optimizer(optimizer)
            with mock.patch.object(
                DeepSpeedZeroOptimizer, "_configure_moe_settings", _for_any_format
            ):
                made = super()._configure_zero_optimizer(optimizer)
            made.reduce_scatter = True
            return made

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
