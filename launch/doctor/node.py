"""Checks of one process on its machine: versions, devices, disk, permissions, limits."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import stat
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

import kinodit
from kinodit.launch.doctor.report import Check, Verdict

GIB = 2**30
MIN_FREE_FAIL_BYTES, MIN_FREE_WARN_BYTES = GIB, 20 * GIB
MIN_SHM_BYTES = GIB // 4
MIN_OPEN_FILES = 4096
MAX_BUSY_SHARE = 0.1
"""Share of a GPU's memory that may be in use before the run starts."""

EXTRAS = {
    "encoders": ("diffusers", "transformers"),
    "media": ("av", "pillow", "soundfile"),
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard",),
}


def check_node(folder: Path, local_rank: int, num_gpus_granted: int) -> list[Check]:
    """Every check of this process. `folder` is the run's; it need not exist yet.

    `num_gpus_granted` is what the scheduler says that this node has for the job; 0: nothing.
    """
    return [
        versions(),
        backends(),
        gpus(local_rank, num_gpus_granted),
        extras(),
        disk(folder),
        permissions(folder),
        limits(),
    ]


def versions() -> Check:
    """What runs: other versions on another node are shown, since their lines differ."""
    found = f"kinodit {kinodit.__version__}, torch {torch.__version__}"
    found += f", python {platform.python_version()}"
    if torch.version.cuda:
        found += f", CUDA {torch.version.cuda}"
    return Check("versions", Verdict.PASS, found)


def backends() -> Check:
    """What ranks can talk over."""
    if not dist.is_available():
        return Check("backends", Verdict.FAIL, "this torch is built without torch.distributed")
    known = {"nccl": dist.is_nccl_available(), "gloo": dist.is_gloo_available()}
    there = [name for name, available in known.items() if available]
    if torch.cuda.is_available() and not known["nccl"]:
        return Check("backends", Verdict.FAIL, "GPUs, but this torch is built without NCCL")
    return Check("backends", Verdict.PASS, ", ".join(there))


def gpus(local_rank: int, num_granted: int) -> Check:
    """The GPU of this rank: there, free, and able to multiply."""
    name = "gpus"
    count = torch.cuda.device_count()
    if not torch.version.cuda and not torch.version.hip:
        verdict = Verdict.WARN if num_granted else Verdict.PASS
        granted = f", though the job has {num_granted}" if num_granted else ""
        return Check(name, verdict, f"this torch uses no GPUs{granted}")
    if count < num_granted:
        found = f"torch sees {count} of the {num_granted} GPUs of the job: nvidia-smi may say why"
        return Check(name, Verdict.FAIL, found)
    if not count:
        return Check(name, Verdict.WARN, "none: training goes on the processor")
    if local_rank >= count:
        return Check(name, Verdict.FAIL, f"local rank {local_rank}, but there are {count} GPUs")
    try:
        return _try_gpu(name, count, local_rank)
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        return Check(name, Verdict.FAIL, f"GPU {local_rank} does not compute: {line}")


def _try_gpu(name: str, count: int, local_rank: int) -> Check:
    device = torch.device("cuda", local_rank)
    free, total = torch.cuda.mem_get_info(device)
    ones = torch.ones(1024, 1024, device=device, dtype=torch.bfloat16)
    if not bool((ones @ ones == 1024).all()):
        return Check(name, Verdict.FAIL, f"GPU {local_rank} multiplies wrongly: take the node out")
    kind = f"{count} x {torch.cuda.get_device_name(device)}, {total / GIB:.0f} GiB"
    if 1 - free / total > MAX_BUSY_SHARE:
        used = (total - free) / GIB
        return Check(name, Verdict.WARN, f"{kind}; GPU {local_rank} has {used:.0f} GiB in use")
    return Check(name, Verdict.PASS, kind)


def extras() -> Check:
    """Which optional libraries are installed. None is needed until a recipe asks for it."""
    there: list[str] = []
    missing: list[str] = []
    for extra, libraries in EXTRAS.items():
        absent = [library for library in libraries if not _installed(library)]
        (missing if absent else there).append(extra)
    found = ", ".join(there) or "none"
    return Check(
        "extras", Verdict.PASS, found + (f"; without {', '.join(missing)}" if missing else "")
    )


def _installed(library: str) -> bool:
    try:
        version(library)
    except PackageNotFoundError:
        return False
    return True


def disk(folder: Path) -> Check:
    """Room for checkpoints, and shared memory for loading."""
    free = shutil.disk_usage(_existing(folder)).free
    found = f"{free / GIB:.0f} GiB free for {folder}"
    if free < MIN_FREE_FAIL_BYTES:
        return Check("disk", Verdict.FAIL, f"{free / 2**20:.0f} MiB free for {folder}")
    if free < MIN_FREE_WARN_BYTES:
        return Check("disk", Verdict.WARN, found)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < MIN_SHM_BYTES:
        mib = shutil.disk_usage(shared).free / 2**20
        return Check("disk", Verdict.WARN, f"{found}; /dev/shm has only {mib:.0f} MiB free")
    # In classes: the free space changes while the ranks look, and lines that differ are noise.
    return Check("disk", Verdict.PASS, f"over {MIN_FREE_WARN_BYTES // GIB} GiB free for {folder}")


def permissions(folder: Path) -> Check:
    """The run's folder is ours, not open to all, and takes a file that is renamed."""
    name = "permissions"
    place = _existing(folder)
    info = place.stat()
    if place == folder and info.st_uid != os.getuid():
        return Check(name, Verdict.FAIL, f"{folder} belongs to another user")
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-", delete=False) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        renamed = Path(f"{file.name}.renamed")
        Path(file.name).replace(renamed)
        renamed.unlink()
    except OSError as error:
        return Check(name, Verdict.FAIL, f"cannot write in {place}: {error.strerror}")
    if place == folder and info.st_mode & stat.S_IWOTH:
        return Check(name, Verdict.WARN, f"anyone may write in {folder}: chmod o-w")
    return Check(name, Verdict.PASS, f"files can be made, synced and renamed for {folder}")


def limits() -> Check:
    """What the system allows a process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        found = f"only {soft} open files: ulimit -n {MIN_OPEN_FILES} in the cluster's setup lines"
        return Check("limits", Verdict.WARN, found)
    return Check("limits", Verdict.PASS, f"{soft if soft >= 0 else 'any number of'} open files")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    return folder if folder.is_dir() else place
