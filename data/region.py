"""Which tokens of a generated stream are given: frames, or a box in all frames.

Shape legend: N tokens of one stream; T frames, H rows, W columns of pixels; t, h, w of latent
cells.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kinodit.data.tasks import StreamTask


def given_tokens(
    task: StreamTask, frame: Tensor, position: Tensor, source: np.random.Generator
) -> Tensor:
    """[N] bool: which tokens are given. One at least is not, if there are any.

    frame: [N] int64, the frame of each token, from 0; position: [N, 3], of which the row and the
    column are read. What the task leaves open is drawn from `source`.
    """
    if task.given == "none" or not len(frame):
        return torch.zeros(len(frame), dtype=torch.bool)
    if task.given in ("inside", "outside"):
        inside = _in_box(task, frame, position, source)
        given = inside if task.given == "inside" else ~inside
    else:
        given = _frames(task, int(frame.max()) + 1, source)[frame]
    return torch.zeros_like(given) if bool(given.all()) else given


def _frames(task: StreamTask, count: int, source: np.random.Generator) -> Tensor:
    """[T] bool, which of `count` frames are given; fewer than all where the task counts them."""
    index = torch.arange(count)
    least, most = task.frames
    drawn = int(source.integers(least, most, endpoint=True))
    num = min(drawn, count - 1)
    if task.given == "prefix":
        return index < num
    if task.given == "suffix":
        return index >= count - num
    if task.given == "ends":
        num = min(drawn, (count - 1) // 2)
        return (index < num) | (index >= count - num)
    if task.given == "every":
        return index % drawn == 0
    if task.given == "random":
        chosen = torch.from_numpy(source.permutation(count)[:num])
        return torch.isin(index, chosen)
    wanted = [at if at >= 0 else count + at for at in task.at]
    return torch.isin(index, torch.tensor(wanted))


def _in_box(
    task: StreamTask, frame: Tensor, position: Tensor, source: np.random.Generator
) -> Tensor:
    """[N] bool: a box of one cell at least, at the same place in every frame whatever its size."""
    low, high = task.area
    side = float(source.uniform(low, high)) ** 0.5
    places = source.uniform(size=2).tolist()
    inside = torch.ones(len(frame), dtype=torch.bool)
    for axis in range(2):
        cell = position[:, 1 + axis].round().to(torch.int64)
        sizes = torch.zeros(int(frame.max()) + 1, dtype=torch.int64)
        sizes = sizes.scatter_reduce(0, frame, cell + 1, "amax")[frame].to(torch.float64)
        part = task.box[2 + axis] if task.box else side
        length = (part * sizes).round().clamp(min=1)
        if task.box:
            first = torch.minimum((task.box[axis] * sizes).round(), sizes - length)
        else:
            first = (places[axis] * (sizes - length + 1)).floor()
        inside &= (cell >= first) & (cell < first + length)
    return inside


def pixels_of(cells: Tensor, size: tuple[int, int, int], stride: int) -> Tensor:
    """Bool [T, H, W] of latent cells [t, h, w]: which pixels they hold.

    size:   T, H, W
    stride: frames of a latent one; fewer frames than all of them are those of a codec, such as a
            causal one, whose first cell holds the first frame alone
    """
    grown = cells
    for dim, length in ((1, size[1]), (2, size[2])):
        grown = grown.repeat_interleave(length // cells.shape[dim], dim=dim)
    if len(cells) * stride == size[0]:
        return grown.repeat_interleave(stride, dim=0)
    return torch.cat([grown[:1], grown[1:].repeat_interleave(stride, dim=0)])
