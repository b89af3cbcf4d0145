"""Decoded packs of a step -> this rank's micro-batches, and what the recipe's encoders imply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed import ProcessGroup

from kinodit.data.encode import (
    AUDIO,
    IMAGE,
    POOLED,
    TEXT,
    VIDEO,
    EncodedSample,
    Encoders,
    SampleEncoder,
    pooled_name,
)
from kinodit.data.loader import StepData
from kinodit.data.packing import PackSpec, StreamSpec, concatenate, pack
from kinodit.data.tasks import TaskMix
from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import ConditionConfig, MMDiTConfig
from kinodit.models.tokens import TokenBatch
from kinodit.trainer.shared_encoding import encode_together

__all__ = ["AUDIO", "IMAGE", "POOLED", "TEXT", "VIDEO", "BatchSource", "fit_model", "pack_spec"]


def pack_spec(streams: Sequence[str], encoders: Encoders, patch: tuple[int, int, int]) -> PackSpec:
    """What packs of a run look like: the streams that its encoders fill, in the model's order.

    `patch` is that of pictures; a stream that no encoder fills is left out. Of a further encoder of
    text that is no stream of the model there is the condition vector alone.
    """
    known = {TEXT: StreamSpec(TEXT, encoders.text.token_dim)}
    known |= {n: StreamSpec(n, e.token_dim) for n, e in encoders.more.items() if n in streams}
    if encoders.video is not None:
        channels = encoders.video.latent_channels
        known |= {name: StreamSpec(name, channels, patch) for name in encoders.pictured}
    if encoders.audio is not None:
        sound = encoders.audio.latent_channels, (encoders.audio_patch, 1, 1)
        known[AUDIO] = StreamSpec(AUDIO, *sound)
    ordered = [name for name in streams if name in known]
    ordered += [name for name in known if name not in streams]
    pooled = {pooled_name(name): encoder.pooled_dim for name, encoder in encoders.texts.items()}
    return PackSpec(tuple(known[name] for name in ordered), pooled)


def fit_model(config: MMDiTConfig, spec: PackSpec) -> MMDiTConfig:
    """The model with the channels that the encoders and the patch give.

    Raises:
        ConfigError: the model's streams or conditions are not those of the data.
    """
    names = [stream.name for stream in spec.streams]
    if list(config.streams) != names:
        raise ConfigError(
            f"model.streams are {list(config.streams)}, the data has {names} (in this order): "
            "name the same streams"
        )
    unknown = [name for name in config.conditions if name not in spec.conditions]
    if unknown:
        raise ConfigError(
            f"model.conditions has {unknown[0]!r}; the data brings {sorted(spec.conditions)}"
        )
    streams = {
        stream.name: replace(config.streams[stream.name], in_channels=stream.token_channels)
        for stream in spec.streams
    }
    conditions = {name: ConditionConfig(dim=spec.conditions[name]) for name in config.conditions}
    return replace(config, streams=streams, conditions=conditions)


@dataclass
class BatchSource:
    """Encodes and packs in the training process, on its device.

    micro_batches: forward passes that this rank's packs are merged into; 0: one for each pack
    dtype:         of the clean latents
    tasks:         what samples are for; None: everything is generated from the text
    sharing:       the ranks that encode a part of every pack each, since they all have it; None:
                   this rank encodes its packs alone
    """

    encoder: SampleEncoder
    spec: PackSpec
    micro_batches: int
    dtype: torch.dtype
    tasks: TaskMix | None = None
    sharing: ProcessGroup | None = None

    def batches(self, data: StepData) -> list[TokenBatch]:
        """This rank's micro-batches of a step. Collective with `sharing`.

        Raises:
            ConfigError: the rank's packs do not divide into `micro_batches`.
        """
        packs = [
            self._pack(encode_together(self.encoder, part, self.sharing)) for part in data.packs
        ]
        if not self.micro_batches:
            return packs
        if len(packs) % self.micro_batches:
            raise ConfigError(
                f"engine.micro_batches={self.micro_batches} does not divide the {len(packs)} "
                "packs that each rank has: change it, or data.packs_per_step"
            )
        size = len(packs) // self.micro_batches
        return [concatenate(packs[i : i + size]) for i in range(0, len(packs), size)]

    def fixed(self, data: StepData, *, shuffle_captions: bool) -> list[TokenBatch]:
        """The packs of a validation step; optionally each clip with the next one's caption."""
        batches = []
        for part in data.packs:
            samples = self.encoder.encode(part)
            batches.append(self._pack(_rotated(samples) if shuffle_captions else samples))
        return batches

    def _pack(self, samples: Sequence[EncodedSample]) -> TokenBatch:
        mixed = [
            sample if self.tasks is None else with_task(sample, self.tasks) for sample in samples
        ]
        return self._cast(pack(mixed, self.spec))

    def _cast(self, batch: TokenBatch) -> TokenBatch:
        return batch.with_latents(
            {name: tokens.latents.to(self.dtype) for name, tokens in batch.modalities.items()}
        )


def with_task(sample: EncodedSample, tasks: TaskMix) -> EncodedSample:
    """The sample with a task that is drawn for it."""
    task = tasks.draw(sample.key, sample.latents, sample.references)
    if task is None:
        return sample
    text, conditions = tasks.captions(task, sample.key, sample.text, sample.conditions)
    return replace(sample, task=task, text=text, conditions=conditions)


def _rotated(samples: Sequence[EncodedSample]) -> list[EncodedSample]:
    """Each sample with the text of the next one in the pack."""
    return [
        replace(sample, text=other.text, conditions=other.conditions)
        for sample, other in zip(samples, [*samples[1:], *samples[:1]], strict=True)
    ]
