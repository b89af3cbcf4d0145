"""Ranks that share a pack encode a part of it each: the same bits, and an error on all of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kinodit.data.encode import SampleEncoder
from kinodit.data.packing import EncodedSample
from kinodit.models.encoders.base import EncoderError
from kinodit.trainer.shared_encoding import encode_together
from tests.data.test_encode import Halves, Words, sample
from tests.support.ranks import Ranks

pytestmark = pytest.mark.gloo
PICTURES = torch.arange(2 * 8 * 8 * 3, dtype=torch.uint8).reshape(2, 8, 8, 3)


class Pairs(Halves):
    """Also single frames; refuses clips of zeros."""

    def encode(self, video: Tensor) -> Tensor:
        if not video.any():
            raise EncoderError("a clip of zeros")
        return super().encode(video)


def encoder() -> tuple[SampleEncoder, Words, Pairs]:
    from kinodit.data.encode import Encoders

    words, pairs = Words(), Pairs()
    return SampleEncoder(Encoders(words, pairs), 0, 0.5), words, pairs


def tensors(encoded: EncodedSample) -> dict[str, Tensor]:
    found = {**encoded.latents, **encoded.text, **encoded.conditions}
    for name, pictures in encoded.references.items():
        found |= {f"{name}/{number}": picture for number, picture in enumerate(pictures)}
    return found


def together(rank: int, world_size: int, num_samples: int, bad: int) -> tuple[object, int]:
    """What a rank got, or the error; and how many clips it encoded."""
    pack = [sample(slot, references=PICTURES if slot % 2 else None) for slot in range(num_samples)]
    pack = [s for s in pack if bad < 0 or s.ref.slot != 0]
    if bad < 0:
        pack = [s for s in pack if bool(s.video.any())]  # type: ignore[union-attr]
    else:
        pack.insert(bad, sample(0))
    encode, _, pairs = encoder()
    try:
        found = encode_together(encode, pack, dist.group.WORLD)
    except EncoderError as error:
        return str(error), pairs.asked
    return [(str(one.key), tensors(one)) for one in found], pairs.asked


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_pack_is_encoded_once_and_alike(world_size: int, groups: dict[int, Ranks]) -> None:
    encode, _, pairs = encoder()
    pack = [sample(slot, references=PICTURES if slot % 2 else None) for slot in range(7)]
    pack = [s for s in pack if s.video is not None and bool(s.video.any())]
    alone = [(str(one.key), tensors(one)) for one in encode.encode(pack)]
    found = groups[world_size].run(together, 7, -1)
    assert sum(asked for _, asked in found) == pairs.asked
    for got, _ in found:
        assert [key for key, _ in got] == [key for key, _ in alone]
        for (_, ours), (_, theirs) in zip(got, alone, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_one_rank_cannot_encode_is_an_error_on_all(groups: dict[int, Ranks]) -> None:
    for bad in (0, 1):
        assert [got for got, _ in groups[2].run(together, 4, bad)] == ["a clip of zeros"] * 2


def test_one_rank_encodes_by_itself() -> None:
    encode, _, _ = encoder()
    (one,) = encode_together(encode, [sample(1)], None)
    assert one.key == sample(1).key and encode_together(encode, [], None) == []
