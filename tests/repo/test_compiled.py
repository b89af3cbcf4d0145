"""The default run notices what is compiled at run time."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.compiled import FOLDERS, built, folders_below
from tests.support.ranks import Ranks


def where(rank: int, world_size: int) -> list[str]:
    """Where this process would build extensions of torch, and kernels of its compiler."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.utils import cpp_extension

    return [cpp_extension._get_build_directory("probe", verbose=False), cache_dir()]


def test_every_process_builds_where_it_is_noticed() -> None:
    ranks = Ranks(1)
    try:
        ((extension, kernels),) = ranks.run(where)
    finally:
        ranks.close()
    assert extension.startswith(os.environ["TORCH_EXTENSIONS_DIR"])
    assert kernels.startswith(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def test_sources_and_locks_are_noticed(tmp_path: Path) -> None:
    environment = folders_below(tmp_path)
    assert set(environment) == set(FOLDERS) and built(environment) == built({}) == set()
    lock = Path(environment[FOLDERS[0]]) / "an_op" / "lock"
    lock.parent.mkdir(parents=True)
    assert built(environment) == set()
    lock.touch()
    assert built(environment) == {str(lock)}
