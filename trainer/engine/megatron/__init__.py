"""The megatron engine: megatron-core's process groups and linears, FSDP2 over its data ranks.

`core` is the only importer of megatron-core, `te` that of TransformerEngine.
"""

from __future__ import annotations

from kinodit.trainer.engine.megatron.assembly import build
from kinodit.trainer.engine.megatron.groups import build_mesh
from kinodit.trainer.engine.megatron.linears import swap_linears

__all__ = ["build", "build_mesh", "swap_linears"]
