"""Products of the large matrices in float8, by torchao, where the hardware has it.

Weights stay as `precision.params` says and inputs as `precision.compute`; both are scaled and
rounded right before a product, gradients likewise (Micikevicius et al., arXiv 2209.05433). Nothing
of it is saved. Only matrices of blocks: what embeds, modulates and predicts is small and sensitive.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from kinodit.models.errors import ConfigError
from kinodit.models.libraries import import_extra
from kinodit.trainer.parallel.apply import PrecisionConfig

MATRICES = re.compile(r"^(joint|single)_blocks\..*\.(attention\.(q|k|v|out)|mlp\.(up|gate|down))$")
MULTIPLE = 16
"""Of the dims of what the hardware multiplies."""
CAPABILITY = (8, 9)
"""Of the first CUDA devices with float8 matrix units."""


def float8_refusal(
    precision: PrecisionConfig, device: str, capability: tuple[int, int], products: str
) -> str:
    """Why products in float8 cannot be had, and what to change; "" if they can, or are not asked.

    capability: compute capability of the CUDA device; products: whose kernels compute them
    """
    if precision.float8 == "none":
        return ""
    asked = f"precision.float8={precision.float8}"
    scales = {"native": ("tensorwise", "rowwise"), "transformer_engine": ("tensorwise",)}
    if precision.float8 not in scales.get(products, ()):
        return (
            f"{asked} is not among what the kernels of {products} do: engine.name=native has "
            "tensorwise and rowwise, engine.name=megatron with engine.linears=transformer_engine "
            "has tensorwise"
        )
    if precision.compute != "bfloat16":
        return (
            f"{asked} rounds what is computed in bfloat16, found precision.compute="
            f"{precision.compute}: set precision.compute=bfloat16"
        )
    if device != "cuda":
        return f"{asked} needs a CUDA device, found {device}: set precision.float8=none"
    if capability < CAPABILITY:
        found, needed = (".".join(map(str, one)) for one in (capability, CAPABILITY))
        return (
            f"{asked} needs matrix units for float8, which CUDA devices have from compute "
            f"capability {needed} on; found {found}: set precision.float8=none"
        )
    return ""


def use_float8(model: nn.Module, precision: PrecisionConfig, tp: int, **settings: Any) -> None:
    """Replace the linears of MATRICES by torchao's, in place; weights stay where they are.

    settings: for torchao's config, beside the recipe's

    Raises:
        ConfigError: a dim is not a multiple of what is multiplied.
        MissingExtraError: torchao is not installed.
    """
    if precision.float8 == "none":
        return
    for name, module in model.named_modules():
        if not MATRICES.match(name):
            continue
        assert isinstance(module, nn.Linear), f"{name} is not a linear"
        # tp splits inputs or outputs.
        sizes = [module.in_features, module.out_features]
        if any(size % (MULTIPLE * tp) for size in sizes):
            raise ConfigError(
                f"precision.float8={precision.float8}: {name} is {sizes[0]} x {sizes[1]}, and "
                f"the hardware multiplies in multiples of {MULTIPLE} on each of {tp} tp rank(s): "
                "change the model's width, or set precision.float8=none"
            )
    library = import_extra("torchao.float8", "torchao", "precision.float8")
    config = library.Float8LinearConfig
    made = config() if precision.float8 == "tensorwise" else config.from_recipe_name("rowwise")
    # Tokens are what is summed over in a weight's gradient, and there is any number of them.
    object.__setattr__(made, "pad_inner_dim", True)
    for key, value in settings.items():
        object.__setattr__(made, key, value)
    library.convert_to_float8_training(
        model, module_filter_fn=lambda _, name: bool(MATRICES.match(name)), config=made
    )
