"""DeepSpeed's ZeRO as an engine: the only importers of deepspeed."""

from __future__ import annotations

from kinodit.trainer.engine.deepspeed.assembly import build

__all__ = ["build"]
