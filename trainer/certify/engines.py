"""Engines that can be certified, by the name that rows of a certificate give them."""

from __future__ import annotations

from collections.abc import Mapping

from kinodit.trainer.engine.config import EngineConfig, NativeConfig

ENGINES: Mapping[str, EngineConfig] = {"native": NativeConfig()}
