"""Tensors of the host that lie in files, which the kernel writes out and reads in as it needs to.

DeepSpeed has a way of its own to a disk: it leaves empty tensors where state was, so that a norm,
an average or a checkpoint would have to read everything back first, and compiles an operation when
a run starts. To a mapped file everybody can go on as if it were memory.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from kinodit.models.errors import ConfigError


class Files:
    """Makes tensors in files of one folder.

    The files have no name there: nothing is left of a run, however it ends.
    """

    def __init__(self, folder: str) -> None:
        """`folder` is on the disk that they are to lie on.

        Raises:
            ConfigError: it is no folder that can be written to.
        """
        self._folder = Path(folder)
        if not self._folder.is_dir() or not os.access(self._folder, os.W_OK):
            raise ConfigError(
                f"engine.nvme_path={folder}: not a folder that can be written to on this node; "
                "name one on a disk of its own, or offload to cpu"
            )

    def copy(self, tensor: Tensor) -> Tensor:
        """A tensor of the same values, shape and format."""
        return self.zeros_like(tensor).copy_(tensor)

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Zeros of the same shape and format; the disk has room for them.

        Raises:
            OSError: it has not.
        """
        if tensor.numel() == 0:
            return torch.zeros_like(tensor)
        handle, name = tempfile.mkstemp(prefix="kinodit-", dir=self._folder)
        try:
            # Without room the first write to a page that has none would end the process.
            os.posix_fallocate(handle, 0, tensor.nbytes)
            made = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        finally:
            os.close(handle)
            Path(name).unlink()
        return made.view(tensor.shape)
