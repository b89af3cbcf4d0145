"""wandb and TensorBoard as sinks of a run's numbers and clips; the only importer of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from kinodit.data.media import gif_bytes

CLOSE_TIMEOUT_S = 60.0
"""How long the end of a run may wait for files to be written; it takes well under a second."""
ONLINE_CLOSE_TIMEOUT_S = 5.0
"""The same for a server. What wandb could not upload by then is in RUN/wandb, for `wandb sync`."""
CONNECT_TIMEOUT_S = 10.0
"""How long wandb may take to answer, in its own thread, before the run is kept offline."""


class Sink(Protocol):
    """A service that takes rows and clips. May raise anything: it is called through `_Guarded`.

    close_timeout_s: how long the end of a run may wait for it
    """

    close_timeout_s: float

    def open(self) -> str | None:
        """Start; called once, before anything else. What a person should know, if anything."""

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Take one row of metrics.jsonl."""

    def media(self, step: int, samples: Sequence[tuple[Path, str]]) -> None:
        """Take the files of one sampling, each with its prompt."""

    def close(self) -> None:
        """Flush and end."""


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by a path that services group: "train/loss", "train/noise_bins/...".

    A noise bin of training is named by its middle, one of validation by its noise level.
    """
    flat: dict[str, float] = {}
    kind = str(row["kind"])
    for key, value in row.items():
        if key in ("kind", "step", "time_s"):
            continue
        if key == "noise_bins":
            for modality, bins in value.items():
                for low, high, loss, _ in bins:
                    flat[f"{kind}/{key}/{modality}/{(low + high) / 2:.3g}"] = loss
        elif isinstance(value, Mapping):
            for modality, levels in value.items():
                for level, loss in levels.items():
                    flat[f"{kind}/{key}/{modality}/{level}"] = loss
        elif isinstance(value, int | float):
            flat[f"{kind}/{key}"] = value
    return flat


class WandbSink:
    """One wandb run, with one id over all resumes; its files are in RUN/wandb."""

    def __init__(
        self,
        run_dir: Path,
        project: str,
        mode: Literal["offline", "online"],
        run_id: str,
        resolved_config: dict[str, Any],
    ) -> None:
        self._run_dir, self._project, self._mode = run_dir, project, mode
        self._run_id, self._resolved_config = run_id, resolved_config
        online = mode == "online"
        self.close_timeout_s = ONLINE_CLOSE_TIMEOUT_S if online else CLOSE_TIMEOUT_S

    def open(self) -> str | None:
        """Start the run, or another part of it after a resume.

        Where the server does not answer, the run is kept offline, whole; returns why.
        """
        import wandb

        try:
            self._init(self._mode)
        except (wandb.Error, OSError) as error:
            if self._mode == "offline":
                raise
            # The helper process still holds the run's id for the attempt that failed.
            wandb.teardown()
            self._init("offline")
            reason = " ".join(str(error).split())
            return f"wandb does not answer ({reason}): `wandb sync` uploads RUN/wandb later"
        return None

    def _init(self, mode: Literal["offline", "online"]) -> None:
        import wandb

        # No console capture, command line, git state or machine statistics: the run records
        # what the trainer gives it and nothing of the machine it runs on.
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            init_timeout=CONNECT_TIMEOUT_S,
            login_timeout=CONNECT_TIMEOUT_S,
            finish_timeout=self.close_timeout_s,
        )
        self._run = wandb.init(
            dir=self._run_dir,
            project=self._project,
            id=self._run_id,
            name=self._run_dir.name,
            resume="allow",
            mode=mode,
            config=self._resolved_config,
            settings=settings,
        )

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of one row."""
        self._run.log(scalars(row), step=int(row["step"]))

    def media(self, step: int, samples: Sequence[tuple[Path, str]]) -> None:
        """Log clips with their prompts."""
        import wandb

        clips = [(path, prompt) for path, prompt in samples if path.suffix == ".mp4"]
        images = [(path, prompt) for path, prompt in samples if path.suffix != ".mp4"]
        media: dict[str, Any] = {}
        if clips:
            media["samples/clips"] = [
                wandb.Video(str(path), caption=prompt, format="mp4") for path, prompt in clips
            ]
        if images:
            media["samples/images"] = [
                wandb.Image(str(path), caption=prompt) for path, prompt in images
            ]
        self._run.log(media, step=step)

    def close(self) -> None:
        """Flush and end."""
        self._run.finish()


class TensorBoardSink:
    """Event files in RUN/tensorboard; after a resume, later steps of earlier files are hidden."""

    def __init__(self, run_dir: Path, purge_step: int | None) -> None:
        self._folder, self._purge_step = run_dir / "tensorboard", purge_step
        self.close_timeout_s = CLOSE_TIMEOUT_S

    def open(self) -> str | None:
        """Start a new event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        return None

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of one row."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, int(row["step"]), walltime=row.get("time_s"))

    def media(self, step: int, samples: Sequence[tuple[Path, str]]) -> None:
        """Log clips with their prompts."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for index, (path, prompt) in enumerate(samples):
            self._writer.add_text(f"samples/{index}/prompt", prompt, step)
            # SummaryWriter.add_video wants moviepy for what Pillow can do: TensorBoard plays GIFs.
            encoded = gif_bytes(path) if path.suffix == ".mp4" else path.read_bytes()
            image = Summary.Image(encoded_image_string=encoded)
            summary = Summary(value=[Summary.Value(tag=f"samples/{index}", image=image)])
            self._writer._get_file_writer().add_summary(summary, step)

    def close(self) -> None:
        """Flush and end."""
        self._writer.close()
