"""The peak FLOP/s that a rank's rate is compared with: of a data sheet, or measured."""

from __future__ import annotations

import time

import torch

PEAK_TFLOPS_BF16 = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}
"""Dense bf16 tensor-core peaks of the vendors' data sheets, by a part of the device's name."""
PRODUCT_SIZE = 768
"""Rows and columns of the matrices whose product is timed on a CPU."""
FIRST_TRIES = 4
AGAIN_AFTER_S = 60.0
"""A product takes some 20 ms: a run spends less than a thousandth of its time on them."""


class Peak:
    """Peak FLOP/s of one rank: a data-sheet figure on CUDA, the fastest matrix product on a CPU.

    A product that shared the CPU with something else tells less than the peak, never more. So the
    best of all counts, and another one is timed whenever `flops_s` is asked for a minute later.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._best = 0.0
        self._again_s = 0.0
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            known = (peak for part, peak in PEAK_TFLOPS_BF16.items() if part in name)
            factor = {torch.bfloat16: 1.0, torch.float32: 0.5}.get(dtype, 0.0)
            self._best = next(known, 0.0) * factor * 1e12
        else:
            self._measure(FIRST_TRIES)

    def flops_s(self) -> float:
        """The best that is known; 0 if nothing is."""
        if self._device.type != "cuda" and time.perf_counter() >= self._again_s:
            self._measure(1)
        return self._best

    def _measure(self, tries: int) -> None:
        took_s = min(product_s(self._dtype) for _ in range(tries))
        self._best = max(self._best, 2 * PRODUCT_SIZE**3 / took_s)
        self._again_s = time.perf_counter() + AGAIN_AFTER_S


def product_s(dtype: torch.dtype) -> float:
    """Seconds that one product of square matrices takes on the CPU."""
    a = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype)
    start_s = time.perf_counter()
    a @ a
    return time.perf_counter() - start_s


def share_of_peak(flops_s: float, peak_flops_s: float) -> float | None:
    """MFU, 0 to 1; None where the peak is not known, or less than what was reached.

    Such a peak was measured while the CPU had other work, and says nothing of the rest either.
    """
    if not peak_flops_s or flops_s > peak_flops_s:
        return None
    return flops_s / peak_flops_s
