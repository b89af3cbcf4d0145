"""The shared vocabulary: one packed token sequence, and who may attend to whom in it.

Shape legend: N tokens of one modality, J tokens of all modalities together (the joint
sequence), C channels of one token, S segments, K distinct (segment, noise level) pairs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor


class Role(IntEnum):
    """What a token is for. An *absent* token is simply not in the batch."""

    CLEAN = 0
    NOISED = 1


@dataclass(frozen=True)
class SampleKey:
    """Names one sample of one step, so that every random draw for it can be keyed.

    `step` is the optimizer step, `slot` the sample's place in the global batch, `sample` an
    identifier that survives re-sharding of the dataset over ranks (dataset name and index).
    """

    step: int
    slot: int
    sample: str


@dataclass(frozen=True)
class ModalityTokens:
    """The packed tokens of one modality, sorted by segment.

    latents:  [N, C] float, patchified latents (or text features)
    segment:  [N] int64, which sample (or which clip of it) a token belongs to, non-decreasing
    group:    [N] int64, attention group within the segment (0-based)
    position: [N, 3] float32, seconds, row, column (of the patch grid) of the patch centre's cell
    role:     [N] int8, a `Role`
    level:    [N] int64, row of the batch's table of noise levels
    weight:   [N] float32, loss weight; 0 for tokens that have no loss
    """

    latents: Tensor
    segment: Tensor
    group: Tensor
    position: Tensor
    role: Tensor
    level: Tensor
    weight: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens, N."""
        return self.latents.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> ModalityTokens:
        """The same tokens with `function` applied to every tensor."""
        return ModalityTokens(**{name: function(tensor) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class AttentionLayout:
    """Segments, contiguous groups, and the group x group visibility table of a packed batch.

    Tokens in *segment-major* order are sorted by (segment, group). The joint sequence that blocks
    see is *stream-major* (all tokens of the first modality, then of the second, ...).

    order:    [J] int64, `joint[order]` is segment-major; None if the two orders are the same
    inverse:  [J] int64, `segment_major[inverse]` is the joint order; None likewise
    lengths:  G token counts: group g is a contiguous run of the segment-major order
    segments: G segment indices, non-decreasing
    visible:  the table's rows, sparse: for each group the groups its queries attend to, ascending.
              A group sees groups of its own segment only.
    """

    order: Tensor | None
    inverse: Tensor | None
    lengths: tuple[int, ...]
    segments: tuple[int, ...]
    visible: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the joint sequence, J."""
        return sum(self.lengths)

    @property
    def num_pairs(self) -> int:
        """Number of (query, key) pairs that attention computes: what its FLOPs are made of."""
        return sum(
            self.lengths[query] * self.lengths[key]
            for query, row in enumerate(self.visible)
            for key in row
        )

    def to(self, device: torch.device) -> AttentionLayout:
        """The same layout with its permutations on `device`."""
        if self.order is None or self.inverse is None:
            return self
        return replace(
            self,
            order=self.order.to(device, non_blocking=True),
            inverse=self.inverse.to(device, non_blocking=True),
        )


Visibility = Callable[[int, int], bool]
"""`visible(query_group, key_group)` within one segment."""


def see_all(query_group: int, key_group: int) -> bool:
    """Every token of a segment sees every other: the visibility of plain generation."""
    return True


def build_layout(
    modalities: Sequence[ModalityTokens], visibility: Visibility | Sequence[Visibility] = see_all
) -> AttentionLayout:
    """The layout of tokens on the host. Must be called before the tokens move to a device.

    `visibility`: of all segments, or of each.
    Groups of one segment with the same visibility row are still separate groups; the attention op
    merges them where that pays.
    """
    segment = torch.cat([tokens.segment for tokens in modalities])
    group = torch.cat([tokens.group for tokens in modalities])
    if segment.numel() == 0:
        return AttentionLayout(None, None, (), (), ())
    code = segment * (int(group.max()) + 1) + group
    order = torch.sort(code, stable=True).indices
    in_order = bool((code[1:] >= code[:-1]).all())
    _, lengths = torch.unique_consecutive(code[order], return_counts=True)
    first = torch.cumsum(lengths, 0) - lengths
    segments = tuple(segment[order][first].tolist())
    groups = tuple(group[order][first].tolist())
    by_segment: dict[int, list[int]] = {}
    for index, owner in enumerate(segments):
        by_segment.setdefault(owner, []).append(index)

    def sees(owner: int) -> Visibility:
        return visibility if callable(visibility) else visibility[owner]

    visible = tuple(
        tuple(key for key in by_segment[owner] if sees(owner)(groups[query], groups[key]))
        for query, owner in enumerate(segments)
    )
    return AttentionLayout(
        order=None if in_order else order,
        inverse=None if in_order else torch.argsort(order),
        lengths=tuple(lengths.tolist()),
        segments=segments,
        visible=visible,
    )


@dataclass(frozen=True)
class TokenBatch:
    """One pack: the packed tokens of every modality, and what they share.

    modalities:    name -> tokens, in the order in which they form the joint sequence
    level_segment: [K] int64, the segment of each row of the table of noise levels
    level_t:       [K] float32, the noise level of each row; t = 1 is noise, t = 0 is data
    conditions:    name -> [S, D] float, named condition vectors of each segment
    layout:        who attends to whom
    samples:       S sample keys, the identity of each segment for keyed draws
    draws:         [S] int64, a number of each segment that draws on the device are keyed by; None
                   where nothing is drawn
    """

    modalities: Mapping[str, ModalityTokens]
    level_segment: Tensor
    level_t: Tensor
    conditions: Mapping[str, Tensor]
    layout: AttentionLayout
    samples: tuple[SampleKey, ...]
    draws: Tensor | None = None

    @property
    def num_segments(self) -> int:
        """Number of segments, S."""
        return len(self.samples)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all modalities, J."""
        return sum(tokens.num_tokens for tokens in self.modalities.values())

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on `device`."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            modalities={name: tokens.map(move) for name, tokens in self.modalities.items()},
            level_segment=move(self.level_segment),
            level_t=move(self.level_t),
            conditions={name: move(vector) for name, vector in self.conditions.items()},
            layout=self.layout.to(device),
            draws=None if self.draws is None else move(self.draws),
        )

    def with_latents(self, latents: Mapping[str, Tensor]) -> TokenBatch:
        """The same batch with other latents ([N, C] each) for the named modalities."""
        changed = {name: replace(self.modalities[name], latents=x) for name, x in latents.items()}
        return replace(self, modalities={**self.modalities, **changed})

    def in_dtype(self, dtype: torch.dtype) -> TokenBatch:
        """The same batch with latents and conditions, which the model multiplies, in `dtype`."""
        latents = {name: tokens.latents.to(dtype) for name, tokens in self.modalities.items()}
        conditions = {name: vector.to(dtype) for name, vector in self.conditions.items()}
        return replace(self.with_latents(latents), conditions=conditions)
