"""Every allowed class of audio autoencoder, tiny and random, saved to disk and read back."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinodit.models.encoders.audio_vae import FAMILIES, AudioVae, AudioVaeConfig
from kinodit.models.encoders.base import EncoderError, SoundFormat, build_audio_codec
from kinodit.models.errors import ConfigError, MissingExtraError

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")

# Arguments, format, samples per latent frame, latent channels.
CASES: dict[str, tuple[dict[str, Any], SoundFormat, int, int]] = {
    "EncodecModel": (
        {
            "sampling_rate": 24000,
            "num_filters": 4,
            "hidden_size": 16,
            "codebook_size": 32,
            "codebook_dim": 16,
            "upsampling_ratios": [4, 2],
            "num_lstm_layers": 1,
            "target_bandwidths": [24.0],
        },
        SoundFormat(24000, 1),
        8,
        16,
    ),
    "DacModel": (
        {
            "encoder_hidden_size": 8,
            "downsampling_ratios": [2, 4, 5],
            "decoder_hidden_size": 48,
            "n_codebooks": 3,
            "codebook_size": 32,
            "codebook_dim": 4,
            "sampling_rate": 16000,
        },
        SoundFormat(16000, 1),
        40,
        64,
    ),
    "AutoencoderOobleck": (
        {
            "encoder_hidden_size": 8,
            "downsampling_ratios": [2, 4, 4],
            "channel_multiples": [1, 2, 2],
            "decoder_channels": 8,
            "decoder_input_channels": 4,
            "audio_channels": 2,
            "sampling_rate": 44100,
        },
        SoundFormat(44100, 2),
        32,
        4,
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                torch.manual_seed(0)
                if name == "AutoencoderOobleck":
                    model = diffusers.AutoencoderOobleck(**CASES[name][0])
                else:
                    config = getattr(transformers, name.replace("Model", "Config"))
                    model = getattr(transformers, name)(config(**CASES[name][0]))
            model.save_pretrained(made[name])
        return made[name]

    return save


def codec(folder: Path, sound: SoundFormat, **settings: Any) -> AudioVae:
    built = build_audio_codec(AudioVaeConfig(path=str(folder), **settings), CPU, sound)
    assert isinstance(built, AudioVae)
    return built


def noise(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_every_family_has_a_case() -> None:
    assert set(CASES) == set(FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_shapes_are_what_the_config_promises(saved: Callable[[str], Path], name: str) -> None:
    _, sound, hop, channels = CASES[name]
    ours = codec(saved(name), sound, factor=2.0)
    assert (ours.format, ours.hop, ours.latent_channels) == (sound, hop, channels)
    clip = noise((sound.num_channels, 13 * hop))
    latents = ours.encode(clip)
    assert latents.shape == (channels, 13, 1, 1) and latents.dtype == torch.float32
    assert torch.equal(latents, 2 * codec(saved(name), sound).encode(clip))
    made = ours.decode(latents)
    assert made.shape == clip.shape and made.dtype == torch.float32
    assert float(made.abs().max()) <= 1
    plain = codec(saved(name), sound)
    assert torch.allclose(made, plain.decode(latents / 2), atol=1e-6)


@pytest.mark.parametrize("name", ["EncodecModel", "DacModel"])
def test_latents_are_those_before_the_quantiser(saved: Callable[[str], Path], name: str) -> None:
    """Decoding through all codebooks is what the library does from sound to sound."""
    _, sound, hop, _ = CASES[name]
    ours = codec(saved(name), sound)
    clip = noise((1, 9 * hop))
    model = getattr(transformers, name).from_pretrained(saved(name)).eval()
    with torch.no_grad():
        whole = model(clip[None])
    made = ours.decode(ours.encode(clip))
    kept = whole.audio_values.reshape(-1).clamp(-1, 1)
    assert torch.allclose(made[0, : len(kept)], kept[: made.shape[1]], atol=1e-5)
    unquantised = codec(saved(name), sound, quantise=False)
    assert not torch.equal(unquantised.decode(ours.encode(clip)), made)


def test_a_posterior_sample_is_a_function_of_the_sound(saved: Callable[[str], Path]) -> None:
    folder, sound = saved("AutoencoderOobleck"), SoundFormat(44100, 2)
    ours = codec(folder, sound, posterior="sample")
    clip = noise((2, 128))
    assert torch.equal(ours.encode(clip), ours.encode(clip))
    assert not torch.equal(ours.encode(clip), codec(folder, sound).encode(clip))
    assert ours.fingerprint != codec(folder, sound).fingerprint


def test_weights_on_the_host_between_uses_change_nothing(saved: Callable[[str], Path]) -> None:
    for name in ("AutoencoderOobleck", "EncodecModel"):
        _, sound, hop, _ = CASES[name]
        ours, theirs = codec(saved(name), sound, offload=True), codec(saved(name), sound)
        clip = noise((sound.num_channels, 5 * hop))
        latents = ours.encode(clip)
        assert torch.equal(latents, theirs.encode(clip))
        assert torch.equal(ours.decode(latents), theirs.decode(latents))
        assert ours.fingerprint == theirs.fingerprint


def test_what_does_not_fit_is_said(saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = saved("DacModel")
    with pytest.raises(EncoderError, match=r"data\.audio_rate=16000 and data\.audio_channels=1"):
        codec(folder, SoundFormat(44100, 2))
    with pytest.raises(ConfigError, match="factor"):
        AudioVaeConfig(path=str(folder), factor=0.0)
    with pytest.raises(EncoderError, match=r"no config\.json"):
        codec(tmp_path, SoundFormat(16000, 1))
    document = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**document, "architectures": ["Mimi"]}))
    with pytest.raises(EncoderError, match=r"holds a Mimi; known .* DacModel"):
        codec(tmp_path, SoundFormat(16000, 1))
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(EncoderError, match="safetensors"):
        codec(tmp_path, SoundFormat(16000, 1))
    stereo = json.loads((saved("EncodecModel") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stereo, "normalize": True}))
    with pytest.raises(EncoderError, match="encodec_24khz"):
        codec(tmp_path, SoundFormat(24000, 1))


def test_without_the_library_the_extra_is_named(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"kinodit\[encoders\]"):
        codec(saved("DacModel"), SoundFormat(16000, 1))
