"""What an engine may be asked for."""

from __future__ import annotations

from kinodit.trainer.engine.config import EngineConfig
from kinodit.trainer.engine.refusals import Wish
from kinodit.trainer.optim import OptimConfig
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig


def cuda_wish(engine: EngineConfig) -> Wish:
    """Four GPUs of compute capability 9.0 in bfloat16."""
    precision = PrecisionConfig(compute="bfloat16")
    return Wish(
        engine, OptimConfig(), ParallelConfig(), precision, RematConfig(), 4, "cuda", (9, 0)
    )
