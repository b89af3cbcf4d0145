"""Run the command line as a user does."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.ranks import ROOT


def kinodit(*arguments: str, ranks: int = 1) -> None:
    """`kinodit ARGUMENTS`, on `ranks` processes of torchrun where there are several."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    words = [*(launcher if ranks > 1 else []), "-m", "kinodit", *arguments]
    subprocess.run([sys.executable, *words], check=True, env=env)
