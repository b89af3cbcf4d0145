"""Engines that can be certified, by the name that rows of a certificate give them."""

from __future__ import annotations

from collections.abc import Mapping

from kinodit.trainer.engine.config import EngineConfig, MegatronConfig, NativeConfig

ENGINES: Mapping[str, EngineConfig] = {
    "native": NativeConfig(),
    "megatron": MegatronConfig(),
    "megatron-no-sp": MegatronConfig(sequence_parallel=False),
}
