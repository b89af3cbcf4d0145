"""A model between training and evaluating."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it `model` evaluates, without gradients; after it, whatever happened, it trains."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
