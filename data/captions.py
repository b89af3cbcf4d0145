"""Which of a sample's captions a step uses."""

from __future__ import annotations

from collections.abc import Sequence

from kinodit.data.record import Caption
from kinodit.models.random import sample_generator, uniform
from kinodit.models.tokens import SampleKey


def with_references(references: Sequence[str], caption: str) -> str:
    """A caption after those of its reference pictures, each by its number: one merged prompt.

    As in-context LoRA has it (Huang et al., arXiv 2410.23775, section 3.2). Pictures without a
    caption are left out, and of a sample without any the caption is what it was.
    """
    parts = [f"[{number}] {text}" for number, text in enumerate(references, 1) if text]
    return " ".join([*parts, caption]).strip() if parts else caption


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
