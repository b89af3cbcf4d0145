"""The one place that picks an engine, and imports its module only then."""

from __future__ import annotations

import importlib
from typing import cast

from torch import nn

from kinodit.trainer.engine.base import Engine
from kinodit.trainer.engine.refusals import Wish, check_wish
from kinodit.trainer.parallel.deferred import Values
from kinodit.trainer.parallel.mesh import Mesh


def build_engine(model: nn.Module, values: Values, mesh: Mesh, wish: Wish) -> Engine:
    """Lay out `model`, which is on the meta device, give it `values`, and drive it. Collective.

    An engine is the module of its name in this package, with a function `build` that takes the
    same arguments.

    Raises:
        ConfigError: the engine cannot do what is asked, or the model cannot be laid out so.
        MissingExtraError: its library is not installed.
    """
    check_wish(wish)
    module = importlib.import_module(f"kinodit.trainer.engine.{wish.engine.name}")
    return cast(Engine, module.build(model, values, mesh, wish))
