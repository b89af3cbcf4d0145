"""Which of a sample's captions a step uses."""

from __future__ import annotations

from collections.abc import Sequence

from kinodit.data.record import Caption
from kinodit.models.random import sample_generator, uniform
from kinodit.models.tokens import SampleKey


def choose_caption(captions: Sequence[Caption], seed: int, key: SampleKey) -> str:
    """The text of one caption, drawn by weight and by the sample's key; "" if there are none.

    Weights that are all zero count as equal.
    """
    if len(captions) < 2:
        return captions[0].text if captions else ""
    weights = [caption.weight for caption in captions]
    if sum(weights) == 0:
        weights = [1.0] * len(captions)
    mark = uniform(sample_generator(seed, key, "caption")) * sum(weights)
    for caption, weight in zip(captions, weights, strict=True):
        mark -= weight
        if mark < 0:
            return caption.text
    # Rounding may leave the mark at the very end; a caption of weight zero is never drawn.
    return next(c.text for c, w in zip(reversed(captions), reversed(weights), strict=True) if w > 0)
