from __future__ import annotations

import pytest
import torch

from kinodit.models.encoders.base import build_text_encoder
from kinodit.models.encoders.byte_text import ByteTextConfig
from kinodit.models.errors import ConfigError

CPU = torch.device("cpu")


def test_one_token_per_byte_after_the_first() -> None:
    encoder = build_text_encoder(ByteTextConfig(dim=32), CPU)
    features = encoder.encode(["cat", "", "é"])
    assert [feature.tokens.shape for feature in features] == [(4, 32), (1, 32), (3, 32)]
    assert features[0].pooled.shape == (encoder.pooled_dim,) == (32,)
    assert encoder.token_dim == 32


def test_the_same_everywhere_and_independent_of_other_captions() -> None:
    one = build_text_encoder(ByteTextConfig(), CPU).encode(["a cat", "left"])
    two = build_text_encoder(ByteTextConfig(), CPU).encode(["left"])
    assert torch.equal(one[1].tokens, two[0].tokens)


def test_order_and_spelling_show() -> None:
    encoder = build_text_encoder(ByteTextConfig(), CPU)
    ab, ba = encoder.encode(["ab", "ba"])
    assert not torch.allclose(ab.pooled, ba.tokens[0])
    assert not torch.allclose(ab.tokens[1:], ba.tokens[1:].flip(0), atol=0.1)
    assert ab.tokens.square().mean() == pytest.approx(1.0, abs=0.3)


def test_cut_at_max_tokens() -> None:
    encoder = build_text_encoder(ByteTextConfig(max_tokens=5), CPU)
    assert encoder.encode(["a long caption"])[0].tokens.shape[0] == 5


def test_fingerprint_follows_settings() -> None:
    prints = {
        build_text_encoder(config, CPU).fingerprint
        for config in (ByteTextConfig(), ByteTextConfig(dim=32), ByteTextConfig(seed=1))
    }
    assert len(prints) == 3
    assert build_text_encoder(ByteTextConfig(), CPU).fingerprint in prints


@pytest.mark.parametrize("wrong", [{"dim": 3}, {"dim": 0}, {"max_tokens": 0}])
def test_bad_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="byte encoder"):
        ByteTextConfig(**wrong)  # type: ignore[arg-type]
