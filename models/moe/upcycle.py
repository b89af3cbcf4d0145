"""Weights of experts from those of a dense model, such that both models say the same.

Shape legend: E experts, h and H hidden widths of an expert and of the dense feed-forward, d width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kinodit.models.config import SINGLE, MMDiTConfig
from kinodit.models.errors import ConfigError
from kinodit.models.mlp import hidden_width
from kinodit.models.moe.config import ExpertsConfig
from kinodit.models.random import generator, normal

Values = Callable[[str, Sequence[int]], Tensor]
"""(parameter name, whole shape) -> the whole value, on the host."""

_EXPERT = re.compile(r"\.mlp\.experts\.(up|gate|down)(_bias)?$")
_POOL = re.compile(r"\.mlp\.(experts|shared|router)\.")


def check_upcycled(config: MMDiTConfig) -> None:
    """Whether a dense model's weights can start `config` without changing what it says.

    Either every expert is a copy of the dense feed-forward, and gates sum to 1 (Komatsuzaki et al.,
    arXiv 2212.05055, section 3); or the shared expert is, and the routed ones start at zero.

    Raises:
        ConfigError: neither; says what to change.
    """
    for name, experts in config.experts.items():
        if is_kept_by_shared(config, experts):
            continue
        router = experts.router
        is_copied = _same(config, experts.expert_ratio) and not experts.shared_ratio
        is_one = router.scale == 1 and (router.renormalise or not router.is_learned)
        is_one = is_one and router.is_dropless
        if not is_copied or not is_one:
            raise ConfigError(
                f"model.experts.{name} cannot start as the dense feed-forward: set shared_ratio = "
                f"{config.mlp_ratio}, whose expert takes its weights while the others start at "
                f"zero; or expert_ratio = {config.mlp_ratio}, shared_ratio = 0, router.scale = 1 "
                "and router.renormalise = true, so that each expert is a copy, and nothing dropped"
            )


def is_kept_by_shared(config: MMDiTConfig, experts: ExpertsConfig) -> bool:
    """Whether the shared expert has the form of the dense feed-forward."""
    return experts.shared_ratio > 0 and _same(config, experts.shared_ratio)


def _same(config: MMDiTConfig, ratio: float) -> bool:
    widths = {config.stream_width(name) for name in config.streams}
    return all(hidden_width(d, ratio, config.activation) == config.hidden(d) for d in widths)


def upcycled_values(
    config: MMDiTConfig, dense: Values, initial: Values, noise: float, seed: int
) -> Values:
    """What `MMDiT(config)` starts from: `dense` has the weights of the model without experts.

    Routers start from `initial`. noise: each expert's copy of a matrix is moved by so many of the
    matrix's standard deviations, by draws of its own; 0: all start alike.

    Raises:
        ConfigError: see `check_upcycled`.
    """
    check_upcycled(config)

    def value(name: str, shape: Sequence[int]) -> Tensor:
        if not _POOL.search(name):
            return dense(name, shape)
        if ".mlp.shared." in name:
            if not is_kept_by_shared(config, _experts_of(config, name)):
                return initial(name, shape)
            return dense(name.replace(".mlp.shared.", ".mlp."), shape)
        if ".mlp.router." in name:
            return initial(name, shape)
        if is_kept_by_shared(config, _experts_of(config, name)):
            is_out = ".experts.down" in name
            return torch.zeros(tuple(shape)) if is_out else initial(name, shape)
        one = dense(_EXPERT.sub(_dense_name, name), shape[1:])
        every = one.unsqueeze(0).repeat(shape[0], *[1] * one.ndim)
        if noise and one.ndim > 1:
            drawn = normal(generator(seed, "upcycle", name), shape).to(every.dtype)
            every = every + noise * one.std() * drawn
        return every

    return value


def _dense_name(found: re.Match[str]) -> str:
    return f".mlp.{found[1]}.{'bias' if found[2] else 'weight'}"


def _experts_of(config: MMDiTConfig, name: str) -> ExpertsConfig:
    parts = name.split(".")
    return config.experts[parts[parts.index("streams") + 1] if "streams" in parts else SINGLE]
