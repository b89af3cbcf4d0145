"""Text encoders split over ranks: the features of the whole ones to the bit, 1/n of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor

from kinodit.data.encode import Encoders, SampleEncoder
from kinodit.models.encoders.base import EncoderError, TextEncoder, build_text_encoder
from kinodit.models.encoders.text import TransformersTextConfig, TransformersTextEncoder
from kinodit.models.errors import ConfigError
from kinodit.trainer.config import load_config
from kinodit.trainer.split_encoders import SplitText, split_encoders
from kinodit.trainer.topology import Topology
from tests.data.test_encode import sample
from tests.resume.test_resume import (
    STEPS,
    Start,
    assert_equal_bits,
    final_tensors,
    metrics,
    run_case,
)
from tests.support.ranks import Ranks
from tests.support.recipes import tiny_recipe, write_dataset
from tests.support.text_models import CAPTIONS, save_model

pytestmark = pytest.mark.gloo
CPU = torch.device("cpu")
KINDS = ("t5", "umt5", "llama", "projected_clip")
Features = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp(kind) for kind in (*KINDS, "bert")}
    for kind, folder in made.items():
        save_model(kind, folder)
    return made


def config(folder: Path, **changes: object) -> TransformersTextConfig:
    pooled = "model" if "clip" in folder.name else "mean"
    return TransformersTextConfig(path=str(folder), layers=(-1, -2), pooled=pooled, **changes)  # type: ignore[arg-type]


def split(rank: int, world_size: int, *parts: TransformersTextConfig, ranks: int = 0) -> Encoders:
    first, *more = [build_text_encoder(part, CPU) for part in parts]
    whole = Encoders(first, more={f"more{n}": one for n, one in enumerate(more)})
    return split_encoders(whole, ranks, Topology(rank, world_size, rank), CPU)


def features_of(encoder: TextEncoder, captions: Sequence[str]) -> Features:
    return [(one.tokens, one.pooled) for one in encoder.encode(captions)]


def model_of(encoder: TextEncoder) -> torch.nn.Module:
    assert isinstance(encoder, SplitText)
    model: torch.nn.Module = encoder._encoder._model
    return model


def shares(model: torch.nn.Module) -> tuple[int, int]:
    """(bytes that this rank holds, bytes of the whole)."""
    tensors = list(model.parameters())
    assert all(isinstance(tensor, DTensor) for tensor in tensors), "a unit is still gathered"
    own = sum(t.to_local().nbytes for t in tensors if isinstance(t, DTensor))
    return own, sum(tensor.nbytes for tensor in tensors)


def encoded(
    rank: int, world_size: int, parts: Sequence[TransformersTextConfig], ranks: int
) -> list[tuple[Features, tuple[int, int]]]:
    """Each rank asks for captions of its own: rank 0 for one, rank 1 for none, rank 2 for all."""
    encoders, found = split(rank, world_size, *parts, ranks=ranks), []
    for encoder in encoders.texts.values():
        own = features_of(encoder, [CAPTIONS[:1], [], CAPTIONS, CAPTIONS[1:]][rank % 4])
        found.append((own, shares(model_of(encoder))))
    return found


def assert_same(ours: Features, theirs: Features) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("world_size", "ranks"), [(2, 0), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_features_are_those_of_the_whole_to_the_bit(
    world_size: int, ranks: int, folders: dict[str, Path], groups: dict[int, Ranks]
) -> None:
    parts = [config(folders[kind], shard=True) for kind in KINDS]
    by_rank = groups[world_size].run(encoded, parts, ranks)
    for number, kind in enumerate(KINDS):
        plain = build_text_encoder(config(folders[kind]), CPU)
        alone = [features_of(plain, [caption])[0] for caption in CAPTIONS]
        assert isinstance(plain, TransformersTextEncoder)
        whole = sum(tensor.nbytes for tensor in plain._model.parameters())
        parts_of_whole = []
        for rank, found in enumerate(by_rank):
            features, (own, everywhere) = found[number]
            asked = [alone[:1], [], alone, alone[1:]][rank]
            assert_same(features, asked)
            assert everywhere == whole
            parts_of_whole.append(own)
        size = ranks or world_size
        assert sum(parts_of_whole) == whole * world_size // size, "each weight has one holder"
        assert max(parts_of_whole) <= 1.05 * whole / size


def at_most_gathered(rank: int, world_size: int, part: TransformersTextConfig) -> tuple[int, int]:
    """(bytes of weights that lie on this rank at most while it encodes, bytes of the whole)."""
    (encoder,) = split(rank, world_size, part).texts.values()
    model, most = model_of(encoder), 0

    def weigh(*_: object) -> None:
        nonlocal most
        held = (t.to_local() if isinstance(t, DTensor) else t for t in model.parameters())
        most = max(most, sum(tensor.nbytes for tensor in held))

    for module in model.modules():
        module.register_forward_pre_hook(weigh)
    encoder.encode(CAPTIONS)
    return most, shares(model)[1]


def test_one_block_is_whole_at_a_time(folders: dict[str, Path], two: Ranks) -> None:
    for most, whole in two.run(at_most_gathered, config(folders["llama"], shard=True)):
        # Half of all, and the other half of the largest: a block, or the table of tokens.
        assert whole / 2 < most < 0.85 * whole


def samples_of(
    rank: int, world_size: int, parts: Sequence[TransformersTextConfig]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Two packs of a rank, by split encoders and by whole ones; ranks have other samples, or none.

    The cache of captions holds nothing, or what one caption takes.
    """
    slots = [range(5 * rank, 5 * rank + 5), [1] * (1 - rank)]
    packs = [[sample(slot, video=None) for slot in pack] for pack in slots]
    found: list[list[dict[str, Tensor]]] = []
    for is_split in (True, False):
        whole = Encoders(
            build_text_encoder(parts[0], CPU), more={"more": build_text_encoder(parts[1], CPU)}
        )
        encoders = (
            split_encoders(whole, 0, Topology(rank, world_size, rank), CPU) if is_split else whole
        )
        encoder = SampleEncoder(encoders, 0, 0.3, 0, text_dropout={"more": 0.4})
        made = [one for pack in packs for one in encoder.encode(pack)]
        encoder.prepare(["a violin"] * rank)
        spoken = [encoder.text(""), *([encoder.text("a violin")] if rank else [])]
        rows = [{**one.text, **one.conditions} for one in made]
        rows += [{**text, **pooled} for text, pooled in spoken]
        found.append(rows)
    return found[0], found[1]


def test_ranks_with_other_samples_encode_together(folders: dict[str, Path], two: Ranks) -> None:
    parts = [config(folders["t5"], shard=True), config(folders["bert"], shard=True)]
    for ours, theirs in two.run(samples_of, parts):
        assert len(ours) == len(theirs) >= 6
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys() == {"text", "more", "text_pooled", "more_pooled"}
            assert all(torch.equal(one[name], other[name]) for name in one)


def refused(rank: int, world_size: int, part: TransformersTextConfig, ranks: int) -> str:
    try:
        split(rank, world_size, part, ranks=ranks)
    except (ConfigError, EncoderError) as error:
        return str(error)
    return ""


def test_what_cannot_be_split_is_refused(folders: dict[str, Path], two: Ranks) -> None:
    part = config(folders["t5"], shard=True)
    for said in two.run(refused, part, 4):
        assert "modalities.shard_ranks=4 do not divide the 2 processes" in said
    with pytest.raises(ConfigError, match="offload=true, which copies all"):
        config(folders["t5"], shard=True, offload=True)
    with pytest.raises(ConfigError, match="must be at least 2, or 0"):
        load_config(Path("configs/t2v_tiny.yaml"), ["modalities.shard_ranks=1"])
    alone = build_text_encoder(part, CPU)
    assert isinstance(alone, TransformersTextEncoder)
    alone._model = torch.nn.Linear(2, 2)
    with pytest.raises(EncoderError, match="no list of blocks to split"):
        alone.split(lambda model, blocks: None)


def test_one_process_has_it_whole(folders: dict[str, Path]) -> None:
    (encoder,) = split(0, 1, config(folders["t5"], shard=True)).texts.values()
    plain = build_text_encoder(config(folders["t5"]), CPU)
    assert not isinstance(encoder, SplitText) and encoder.fingerprint == plain.fingerprint
    assert_same(features_of(encoder, CAPTIONS), features_of(plain, CAPTIONS))


@pytest.mark.slow
def test_a_run_is_the_same_resumes_and_saves_none_of_the_weights(
    folders: dict[str, Path], tmp_path: Path, two: Ranks
) -> None:
    text = {"name": "transformers", "path": str(folders["t5"]), "max_tokens": 16}
    recipe = tiny_recipe(
        tmp_path,
        write_dataset(tmp_path, 6),
        run={"steps": STEPS, "out_dir": str(tmp_path / "runs")},
        eval={"every_steps": 3, "num_samples": 6, "shuffled_captions": True},
        sample={"every_steps": 3, "prompts": ["a", "b", "c"], "sampler": {"steps": 1}},
    )
    whole = yaml.safe_load(recipe.read_text())
    whole["modalities"]["text"] = {"encoder": text}
    recipe.write_text(yaml.safe_dump(whole))
    on, off = (f"modalities.text.encoder.shard={value}" for value in ("true", "false"))
    two.run(run_case, Start(recipe, "whole", overrides=(off,)))
    two.run(run_case, Start(recipe, "changing", 2, overrides=(on,)))
    two.run(run_case, Start(recipe, "changing", 2, overrides=(off,)))
    two.run(run_case, Start(recipe, "changing", overrides=(on, "modalities.shard_ranks=2")))
    ours, theirs = final_tensors(recipe, "changing"), final_tensors(recipe, "whole")
    assert_equal_bits(ours, theirs)
    assert metrics(recipe, "changing") == metrics(recipe, "whole")
    names = {key.split("/")[0] for key in ours}
    assert names == {"model", "optim", "ema"}
    table = build_text_encoder(TransformersTextConfig(path=str(folders["t5"])), CPU)
    assert isinstance(table, TransformersTextEncoder)
    weights = {tuple(t.shape) for t in table._model.parameters() if t.ndim == 2}
    assert not {(300, 16)} & {np.shape(value) for value in ours.values()}
    assert (300, 16) in weights, "the table of tokens is what would be found"
