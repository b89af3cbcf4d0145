"""What is likely wrong with a layout, in words, from how its numbers are wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from kinodit.trainer.certify.trace import Array

SAME_FACTOR = 1e-6
WHOLE = re.compile(r"norm|bias|^embeds|^condition|^heads")


def likely_cause(
    faults: tuple[str, ...],
    reference: Mapping[str, Array],
    gradients: Mapping[str, Array],
    where: tuple[str, str] | None,
) -> str:
    """One sentence. `where` is the first module that differs, as `first_difference` says."""
    if any("has other" in fault or "never came" in fault for fault in faults):
        return (
            "data or noise depend on the rank: ranks that share a pack must be given the same one, "
            "and every draw must be keyed by its sample"
        )
    if where is not None and where[1] == "output":
        name = where[0]
        if name.endswith(".attend"):
            return (
                "attention meets the wrong keys: look at the order of tokens or heads, the mask, "
                "and how partial results are merged"
            )
        if name.startswith(("embeds", "condition")):
            return "weights or positions differ before the first block"
        return f"look at what crosses between ranks just before {name}"
    factor = common_factor(reference, gradients)
    if factor is not None and abs(factor - 1) > SAME_FACTOR:
        return (
            f"every gradient is {factor:.4g} times what it should be: the loss is divided by the "
            "counts of too few ranks or micro-batches, or gradients are averaged, not summed"
        )
    if where is not None:
        return f"the forward is right; look at the backward of what follows {where[0]}"
    wrong = [name for name in reference if not np.allclose(gradients.get(name, 0), reference[name])]
    if wrong and all(WHOLE.search(name) for name in wrong):
        return (
            "gradients of parameters that every rank has whole (norms, biases, embeddings) are not "
            "summed over all ranks that used them"
        )
    if wrong:
        return "forward and backward are right; gradients are reduced over the wrong group"
    return "gradients are right; look at clipping, the optimizer and the averages"


def common_factor(reference: Mapping[str, Array], gradients: Mapping[str, Array]) -> float | None:
    """The one number that every gradient is off by, if there is one."""
    factors = []
    for name, expected in reference.items():
        found = gradients.get(name)
        norm = float((expected * expected).sum())
        if found is None or found.shape != expected.shape or norm == 0:
            continue
        factor = float((found * expected).sum()) / norm
        rest = np.abs(found - factor * expected).max(initial=0.0)
        if rest > SAME_FACTOR * np.abs(expected).max(initial=0.0):
            return None
        factors.append(factor)
    if not factors or max(factors) - min(factors) > SAME_FACTOR * max(map(abs, factors)):
        return None
    return factors[0]
