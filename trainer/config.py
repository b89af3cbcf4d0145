"""A run's configuration: the sections' dataclasses, composed; a recipe, merged, checked, frozen.

A recipe is YAML that holds only differences from the defaults. It is merged in two passes, since
a *choice* (an objective, a codec, ...) is a field whose `name` decides its dataclass: first the
names are read, then everything is merged against the schema that they select.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from kinodit.data.config import DataConfig
from kinodit.data.encode import AUDIO, IMAGE, TEXT, VIDEO, pooled_name
from kinodit.data.tasks import TaskConfig, check_tasks
from kinodit.models.diffusion.objective import OBJECTIVES, ObjectiveConfig, RectifiedFlowConfig
from kinodit.models.diffusion.timesteps import SHIFTS, TIMESTEPS
from kinodit.models.encoders.base import AudioCodecConfig, TextEncoderConfig, VideoCodecConfig
from kinodit.models.encoders.registry import AUDIO_CODECS, TEXT_ENCODERS, VIDEO_CODECS
from kinodit.models.errors import ConfigError
from kinodit.models.mmdit import MMDiTConfig
from kinodit.models.presets import PRESETS
from kinodit.trainer.checkpoint import CheckpointConfig
from kinodit.trainer.ema import EmaConfig
from kinodit.trainer.engine.config import ENGINES, EngineConfig, NativeConfig
from kinodit.trainer.evaluate import EvalConfig
from kinodit.trainer.generate import SampleConfig
from kinodit.trainer.optim import OPTIMIZERS, OptimConfig, ScheduleConfig
from kinodit.trainer.parallel.apply import PrecisionConfig
from kinodit.trainer.parallel.mesh import ParallelConfig
from kinodit.trainer.parallel.remat import RematConfig
from kinodit.trainer.recipe import RunSection, explain, read_recipe
from kinodit.trainer.redact import redact, redact_values, secret_values
from kinodit.trainer.resilience.config import ResilienceConfig
from kinodit.trainer.sinks import LogConfig
from kinodit.trainer.upcycle import UpcycleConfig


@dataclass(frozen=True)
class VideoModality:
    """codec: pixels <-> latents; patch: latent frames, rows and columns in one token."""

    codec: VideoCodecConfig = field(default_factory=VIDEO_CODECS["wavelet"])
    patch: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self) -> None:
        if min(self.patch) < 1:
            raise ConfigError(f"modalities.video.patch={list(self.patch)}: each must be at least 1")


@dataclass(frozen=True)
class AudioModality:
    """codec: sound <-> latents; patch: latent frames in one token."""

    codec: AudioCodecConfig = field(default_factory=AUDIO_CODECS["mel"])
    patch: int = 1

    def __post_init__(self) -> None:
        if self.patch < 1:
            raise ConfigError(f"modalities.audio.patch={self.patch}: must be at least 1")


@dataclass(frozen=True)
class TextModality:
    """Captions -> features, by one encoder or several.

    encoder: of the stream "text" and its condition vector "text_pooled"
    more:    NAME -> another encoder of the same captions, for the stream NAME, the condition
             NAME_pooled, or both: those that the model has (SD3 has both of two encoders and the
             stream of a third, FLUX the stream of one and the condition of another)
    dropout: NAME -> share of samples in which that encoder alone is given the empty caption, drawn
             for each by itself, on top of objective.condition_dropout (Esser et al., arXiv
             2403.03206, section 5.1.2: 46.4 % of each)
    """

    encoder: TextEncoderConfig = field(default_factory=TEXT_ENCODERS["bytes"])
    more: dict[str, TextEncoderConfig] = field(default_factory=dict)
    dropout: dict[str, float] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, TextEncoderConfig]:
        """Name -> encoder."""
        return {TEXT: self.encoder, **self.more}

    def __post_init__(self) -> None:
        for name in self.more:
            if name in (TEXT, VIDEO, IMAGE, AUDIO) or not name.replace("_", "a").isalnum():
                raise ConfigError(
                    f"modalities.text.more.{name}: the name must be letters, digits and _, and not "
                    f"{TEXT}, {VIDEO}, {IMAGE} or {AUDIO}"
                )
        for name, share in self.dropout.items():
            if name not in (TEXT, *self.more) or not 0 <= share <= 1:
                raise ConfigError(
                    f"modalities.text.dropout.{name}={share}: it must be 0 to 1, of one of "
                    f"{', '.join((TEXT, *self.more))}"
                )


@dataclass(frozen=True)
class ModalitiesConfig:
    """How each modality becomes tokens. Which of them there are, model.streams says.

    share_encoding: ranks that share a pack (parallel.cp x parallel.tp) encode a part of it each and
                    exchange what they made; else each encodes all of it
    shard_ranks:    neighbouring ranks that hold the weights of text encoders with shard=true
                    together; 0: those of a node
    """

    video: VideoModality = field(default_factory=VideoModality)
    audio: AudioModality = field(default_factory=AudioModality)
    text: TextModality = field(default_factory=TextModality)
    share_encoding: bool = False
    shard_ranks: int = 0

    def __post_init__(self) -> None:
        if self.shard_ranks < 0 or self.shard_ranks == 1:
            raise ConfigError(
                f"modalities.shard_ranks={self.shard_ranks}: must be at least 2, or 0 for the "
                "ranks of a node"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run. Sections are documented where they are defined."""

    run: RunSection = field(default_factory=RunSection)
    modalities: ModalitiesConfig = field(default_factory=ModalitiesConfig)
    model: MMDiTConfig = field(default_factory=lambda: PRESETS["tiny"])
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    objective: ObjectiveConfig = field(default_factory=RectifiedFlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: dict[str, EmaConfig] = field(default_factory=dict)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    remat: RematConfig = field(default_factory=RematConfig)
    engine: EngineConfig = field(default_factory=NativeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

    def __post_init__(self) -> None:
        for key, name in (("eval.ema", self.eval.ema), ("sample.ema", self.sample.ema)):
            if name and name not in self.ema:
                raise ConfigError(
                    f"{key}={name}: there is no such average; ema has {sorted(self.ema)}"
                )
        check_tasks(self.tasks, {name: s.output for name, s in self.model.streams.items()})
        self._check_routers()
        self._check_references()
        for name in self.modalities.text.more:
            stream = self.model.streams.get(name)
            if stream is not None and stream.output:
                raise ConfigError(
                    f"model.streams.{name} is fed by modalities.text.more.{name} and is generated: "
                    "set its output to false"
                )
        if self.engine.micro_batches and self.data.packing != "count":
            raise ConfigError(
                f"engine.micro_batches={self.engine.micro_batches} merges packs, which "
                f"data.packing={self.data.packing} has filled up to the budget: set it to 0"
            )

    def uses_text(self, name: str) -> bool:
        """Whether the model has the stream, or the condition, of an encoder of text."""
        return name in self.model.streams or pooled_name(name) in self.model.conditions

    def _check_routers(self) -> None:
        """Tokens that compete for experts tell each other what a task may not let them see."""
        restricted = [name for name, task in self.tasks.items() if task.is_restricted]
        for name, experts in self.model.experts.items():
            router = experts.router
            if restricted and (router.choice == "expert" or router.capacity_factor):
                raise ConfigError(
                    f"tasks.{restricted[0]} hides tokens from others, but in model.experts.{name} "
                    "the tokens of a sample compete for experts, by which each depends on all: set "
                    "router.choice: token and router.capacity_factor: 0"
                )

    def _check_references(self) -> None:
        for name, task in self.tasks.items():
            for stream in task.wanting:
                if stream not in (VIDEO, IMAGE) or not self.data.max_references:
                    raise ConfigError(
                        f"tasks.{name}.streams.{stream}.references needs pictures that samples of "
                        f"the stream {VIDEO!r} or {IMAGE!r} bring along, data.max_references of "
                        "them at most: "
                        "set it to 1 or more"
                    )


CHOICES: dict[str, Mapping[str, type]] = {
    "objective": OBJECTIVES,
    "objective.timesteps": TIMESTEPS,
    "objective.shift": SHIFTS,
    "optim": OPTIMIZERS,
    "modalities.video.codec": VIDEO_CODECS,
    "modalities.audio.codec": AUDIO_CODECS,
    "modalities.text.encoder": TEXT_ENCODERS,
    "engine": ENGINES,
}

NAMED_CHOICES: dict[str, Mapping[str, type]] = {"modalities.text.more": TEXT_ENCODERS}
"""Mappings of names of one's own to choices."""

CONFIG_FILE = "config.yaml"
"""The resolved recipe, in the run's folder."""

MAY_CHANGE_ON_RESUME = (
    "modalities.share_encoding",
    "modalities.shard_ranks",
    "run.out_dir",
    "run.deadline_s",
    "run.require_certificate",
    "parallel.",
    "remat.",
    "engine.",
    "checkpoint.",
    "resilience.",
    "log.",
    "eval.",
    "sample.",
    "data.num_threads",
    "data.prefetch_steps",
    "data.cache_mib",
    "data.workers",
    "data.decode_limit_s",
    "data.on_error",
    "data.quarantine.",
    "data.storage.",
    "run.stop_after_steps",
)
"""Keys that leave the loss curve as it is, so that a run may go on with other values."""

PLACES_OF_WEIGHTS = (".offload", ".shard")
"""Keys of the same kind of every encoder, within `modalities`."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The recipe at `path` with `overrides` ("key=value" each), complete and checked.

    Raises:
        ConfigError: no such file, not YAML, unknown key, wrong type, or a value that does not fit.
    """
    raw = read_recipe(path, overrides)
    try:
        return _build(raw)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _build(raw: DictConfig) -> RunConfig:
    """Merge `raw` against the schema that its choices and its model preset select."""
    schema = copy.deepcopy(_schema())
    choices = dict(CHOICES)
    for key, options in NAMED_CHOICES.items():
        named = OmegaConf.select(raw, key)
        choices |= {f"{key}.{name}": options for name in named or {}}
    for key, options in choices.items():
        name = OmegaConf.select(raw, f"{key}.name")
        if name is None and key not in CHOICES:
            raise ConfigError(f"{key} has no name: there is {', '.join(sorted(options))}")
        if name is None:
            continue
        if name not in options:
            raise ConfigError(f"{key}.name={name!r}: there is {', '.join(sorted(options))}")
        _replace(schema, key, options[name])
    preset = OmegaConf.select(raw, "model.preset")
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"model.preset={preset!r}: there is {', '.join(sorted(PRESETS))}")
        _replace(schema, "model", PRESETS[preset])
        del raw.model["preset"]
    else:
        # Without a preset, streams and conditions are those that are named: a resolved recipe's.
        for part in ("streams", "conditions"):
            if OmegaConf.select(raw, f"model.{part}") is not None:
                _replace(schema, f"model.{part}", {})
    return cast(RunConfig, OmegaConf.to_object(OmegaConf.merge(schema, raw)))


@cache
def _schema() -> DictConfig:
    """Of every recipe, before its choices; to be copied."""
    made: DictConfig = OmegaConf.structured(RunConfig)
    return made


def _replace(schema: DictConfig, key: str, value: Any) -> None:
    """Put the dataclass (or instance) `value` at `key` of a read-only schema."""
    parent_key, _, last = key.rpartition(".")
    parent = OmegaConf.select(schema, parent_key) if parent_key else schema
    with flag_override(parent, "readonly", False):
        value = value if value == {} else OmegaConf.structured(value)
        OmegaConf.update(parent, last, value, merge=False)


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested dicts and lists of every field."""
    plain = _plain(config)
    assert isinstance(plain, dict)
    return cast(dict[str, Any], plain)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def config_to_yaml(config: RunConfig, *, redact_secrets: bool = True) -> str:
    """The complete recipe as YAML; values of keys that look like secrets are replaced."""
    plain = redacted(config) if redact_secrets else config_to_dict(config)
    return yaml.safe_dump(plain, sort_keys=False)


def redacted(config: RunConfig) -> Any:
    """The complete recipe as plain data; values of keys that look like secrets are replaced."""
    # A value of the environment's secrets may stand under any name.
    return redact_values(redact(config_to_dict(config)), secret_values(os.environ))


@dataclass(frozen=True)
class SchemaRow:
    """One key of the schema."""

    key: str
    type: str
    default: str
    doc: str


def schema() -> list[SchemaRow]:
    """Every key with its type and default; choices are listed once per option."""
    rows = list(_rows(RunConfig(), ""))
    for key, options in CHOICES.items():
        for option in options.values():
            rows += list(_rows(option(), f"{key}."))
    return list({(row.key, row.type, row.default): row for row in rows}.values())


def _rows(instance: Any, prefix: str) -> Iterator[SchemaRow]:
    doc = (type(instance).__doc__ or "").strip()
    for entry in dataclasses.fields(instance):
        value = getattr(instance, entry.name)
        if dataclasses.is_dataclass(value):
            yield from _rows(value, f"{prefix}{entry.name}.")
        else:
            yield SchemaRow(f"{prefix}{entry.name}", str(entry.type), repr(value), doc)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every key whose value differs; None where a key is absent."""
    before, after = flatten(old), flatten(new)
    keys = [*before, *(key for key in after if key not in before)]
    return [
        (key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    ]


def with_later_keys(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """`saved`, with the keys of `now` that it lacks where these are at their defaults.

    Both are whole recipes. A key that an older version did not have is no difference as long as
    nobody sets it: a default leaves a run as it was.
    """
    if flatten(now).keys() <= flatten(saved).keys():
        return dict(saved)
    return _filled(saved, now, _build(OmegaConf.create(dict(now))))


def _filled(saved: Mapping[str, Any], now: Mapping[str, Any], item: Any) -> dict[str, Any]:
    """The same of one section, and of the sections within it; `item`: what `now` says."""
    filled = dict(saved)
    if dataclasses.is_dataclass(item):
        default = {part.name: _default(part) for part in dataclasses.fields(item)}
        parts = {name: getattr(item, name) for name in default}
    elif isinstance(item, Mapping):
        default, parts = {}, dict(item)
    else:
        return filled
    for name, value in parts.items():
        if name in saved and isinstance(saved[name], Mapping) and name in now:
            filled[name] = _filled(saved[name], now[name], value)
        elif name not in saved and name in default and default[name] == value:
            filled[name] = now[name]
    return filled


def _default(part: dataclasses.Field[Any]) -> Any:
    if part.default_factory is not dataclasses.MISSING:
        return part.default_factory()
    return part.default


def check_resumable(saved_yaml: str, config: RunConfig, where: Path) -> None:
    """Refuse to go on in the folder of a run with another recipe.

    Raises:
        ConfigError: a key differs that would change the loss curve; all of them are listed.
    """
    saved = yaml.safe_load(saved_yaml)
    current = redacted(config)
    changed = [
        f"{key}: was {old}, is {new}"
        for key, old, new in differences(with_later_keys(saved, current), current)
        if not may_change(key)
    ]
    if changed:
        raise ConfigError(
            f"{where} holds a run of another recipe ({'; '.join(changed)}): choose another "
            "run.name, or undo these changes"
        )


def may_change(key: str) -> bool:
    """Whether a run may go on with another value of `key`."""
    is_place = key.startswith("modalities.") and key.endswith(PLACES_OF_WEIGHTS)
    return is_place or key.startswith(MAY_CHANGE_ON_RESUME)
