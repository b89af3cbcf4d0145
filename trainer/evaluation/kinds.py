"""What kind of thing a feature is of: the nearest of the kinds that real clips show.

Nearest to their means, in units of how far features of one kind lie apart: what varies within a
kind (the background that shines through a thing, when its sound begins) counts little. It is the
linear discriminant of Fisher (1936), its covariance drawn towards a multiple of the unit matrix
(Friedman, "Regularized discriminant analysis", JASA 1989, equation 18).

Shape legend: n real clips of K kinds, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kinodit.trainer.evaluation.distance import Features

RIDGE = 0.1
"""Added to each feature's variance, in units of their mean variance."""

Answers = Sequence[bool | None]
"""Whether each clip does as told; None where it was not told."""


@dataclass(frozen=True)
class Kinds:
    """Features of real clips by what they are of.

    real: (name, features [D]) of each real clip; "" or None where there is none
    """

    real: Sequence[tuple[str, Features | None]]

    @cached_property
    def _rows(self) -> dict[str, Features]:
        """Name -> [n, D], in the order in which names come first."""
        rows: dict[str, list[Features]] = {}
        for name, features in self.real:
            if name and features is not None:
                rows.setdefault(name, []).append(features)
        return {name: np.stack(own) for name, own in rows.items()}

    @cached_property
    def _means(self) -> dict[str, Features]:
        return {name: rows.mean(axis=0) for name, rows in self._rows.items()}

    @cached_property
    def _scatter(self) -> Features:
        """[D, D] sum of squares and products of what features differ from their kind's mean."""
        off = np.concatenate([rows - self._means[name] for name, rows in self._rows.items()])
        scatter: Features = off.T @ off
        return scatter

    @property
    def num_names(self) -> int:
        """How many kinds there are to choose from."""
        return len(self._rows)

    def found(self, asked: Sequence[tuple[str, Features | None]]) -> Answers:
        """Whether the nearest kind is the one asked for; None where that is not known here."""
        precision = self._precision(self._scatter, 0) if self._rows else None
        return [
            None
            if name not in self._rows or features is None or precision is None
            else _nearest(features, self._means, precision) == name
            for name, features in asked
        ]

    def found_in_real(self) -> Answers:
        """The same of each real clip, compared with the others alone; None of the only one."""
        answers: list[bool | None] = []
        for name, features in self.real:
            count = len(self._rows.get(name, ()))
            if count < 2 or features is None:
                answers.append(None)
                continue
            off = features - self._means[name]
            others = {**self._means, name: self._means[name] - off / (count - 1)}
            scatter = self._scatter - count / (count - 1) * np.outer(off, off)
            answers.append(_nearest(features, others, self._precision(scatter, 1)) == name)
        return answers

    def _precision(self, scatter: Features, num_left_out: int) -> Features:
        """[D, D] inverse of the covariance within kinds; the unit matrix if nothing varies."""
        num_clips = sum(map(len, self._rows.values())) - num_left_out
        covariance = scatter / max(1, num_clips - self.num_names)
        unit, variance = np.eye(len(covariance)), np.trace(covariance) / len(covariance)
        if variance < 1e-12:
            return unit
        precision: Features = np.linalg.inv(covariance + RIDGE * variance * unit)
        return precision


def _nearest(features: Features, means: Mapping[str, Features], precision: Features) -> str:
    names = list(means)
    off = features - np.stack([means[name] for name in names])
    distance = ((off @ precision) * off).sum(axis=1).tolist()
    return min(zip(distance, names, strict=True))[1]
