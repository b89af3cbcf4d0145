"""Frames as they are coded, brightness and halved colours, and their way to RGB on any device.

Half the bytes of RGB through processes, caches and memory; the conversion is left to the device
that encodes. Shape legend: T frames, H rows, W columns, both even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MATRICES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
"""K_r and K_b of ITU-R BT.601-7 section 2.5.1, BT.709-6 section 3.2 and BT.2020-2 table 4."""


@dataclass(frozen=True)
class Planes:
    """A clip in 4:2:0.

    y:       [T, H, W] uint8
    uv:      [T, 2, H / 2, W / 2] uint8
    matrix:  a name of `MATRICES`
    is_full: brightness is 0 to 255, not 16 to 235
    """

    y: Tensor
    uv: Tensor
    matrix: str
    is_full: bool

    @property
    def num_bytes(self) -> int:
        """Memory of all planes."""
        return self.y.numel() + self.uv.numel()

    def to_rgb(self, device: torch.device) -> Tensor:
        """Uint8 [T, H, W, 3] on `device`; each pair of colours holds for its square of four pixels.

        BT.601-7 and BT.709-6, section 3 each: R = Y + 2 (1 - K_r) C_r, and so on, in float32.
        """
        red, blue = MATRICES[self.matrix]
        green = 1 - red - blue
        y = self.y.to(device).to(torch.float32)
        uv = self.uv.to(device).to(torch.float32) - 128
        uv = uv.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
        if not self.is_full:
            y, uv = (y - 16) * (255 / 219), uv * (255 / 224)
        u, v = uv[:, 0], uv[:, 1]
        r = y + 2 * (1 - red) * v
        b = y + 2 * (1 - blue) * u
        g = (y - red * r - blue * b) / green
        return torch.stack([r, g, b], dim=-1).round_().clamp_(0, 255).to(torch.uint8)
