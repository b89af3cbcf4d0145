"""The data order of a recipe without its encoders' weights: for looking at it, and for proofs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kinodit.data.encode import IMAGE
from kinodit.data.manifest import Dataset
from kinodit.data.record import RecordMeta
from kinodit.data.reference_counts import ReferenceCounts, count_references
from kinodit.data.select import open_datasets, plan_spec
from kinodit.data.spec import CostModel, PlanSpec
from kinodit.launch.plan.workload import Given, audio_sizes, codec_shapes, text_tokens
from kinodit.trainer.batches import AUDIO, VIDEO
from kinodit.trainer.config import RunConfig
from kinodit.trainer.encoders import cost_of_latents, parity_tokens


@dataclass(frozen=True)
class DataOrder:
    """The plan of a recipe, its datasets, and what had to be assumed.

    The order is that of a run; the fingerprint is not, since encoders' weights are part of it.
    """

    spec: PlanSpec
    datasets: dict[str, Dataset]
    notes: tuple[str, ...]


def data_order(config: RunConfig) -> DataOrder:
    """The data order of `config`; no weights are read.

    Raises:
        UserError: datasets, sizes or budgets do not fit.
    """
    notes: list[str] = []
    num_text_tokens = text_tokens(config, notes)
    if VIDEO in config.model.streams:
        codec = codec_shapes(config, Given(), notes)
        cost = cost_of_latents(config, codec.latent_shape, codec.stride, num_text_tokens)
    else:
        parity = parity_tokens(config.model) if config.data.packing != "count" else 0
        cost = CostModel(0, 0, text_tokens=num_text_tokens, parity_tokens=parity)
    if AUDIO in config.model.streams:
        growth = max((task.most_tokens for task in config.tasks.values()), default=1)
        cost = replace(cost, audio_tokens=growth * audio_sizes(config, notes)[0])
    datasets = open_datasets(config.data)
    spec = plan_spec(config.data, datasets, cost, config.run.seed)
    return DataOrder(spec, datasets, tuple(notes))


def reference_counts(config: RunConfig, order: DataOrder, num_steps: int) -> ReferenceCounts | None:
    """Reference pictures in the packs of the first steps; None if the recipe has none, or streams.

    Raises:
        UserError: a record is damaged, or no task fits a sample.
    """
    if not config.data.max_references or not all(d.is_exact for d in order.spec.datasets):
        return None

    def streams_of(meta: RecordMeta) -> list[str]:
        if meta.modality == "audio":
            return []
        is_still = meta.modality == "image" and IMAGE in config.model.streams
        has_sound = meta.has_audio and config.data.use_audio
        return [IMAGE if is_still else VIDEO, *([AUDIO] if has_sound else [])]

    return count_references(order.spec, order.datasets, config.tasks, streams_of, num_steps)
