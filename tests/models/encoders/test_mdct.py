"""The MDCT codec: lossless for sound of 16 bits, orthonormal, overlapping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kinodit.models.encoders.base import EncoderError, SoundFormat, build_audio_codec
from kinodit.models.encoders.mdct import MdctCodec, MdctConfig
from kinodit.models.errors import ConfigError

CPU = torch.device("cpu")


def codec(num_channels: int = 1, hop: int = 32, power: float = 0.5, gain: float = 1.0) -> MdctCodec:
    config = MdctConfig(hop=hop, power=power, gain=gain)
    built = build_audio_codec(config, CPU, SoundFormat(8000, num_channels))
    assert isinstance(built, MdctCodec)
    return built


def pcm(num_channels: int, num_samples: int, peak: int = 32768, seed: int = 0) -> Tensor:
    """Random sound of 16 bits."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(-peak, peak, (num_channels, num_samples), generator=source) / 32768


@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("hop", [2, 30, 256])
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("peak", [3, 32768])
def test_sound_of_16_bits_survives(num_channels: int, hop: int, power: float, peak: int) -> None:
    ours = codec(num_channels, hop, power, gain=3.0)
    for num_frames in (1, 2, 7):
        sound = pcm(num_channels, num_frames * hop, peak)
        latents = ours.encode(sound)
        assert latents.shape == (ours.latent_channels, num_frames, 1, 1)
        assert latents.dtype == torch.float32
        assert torch.equal((ours.decode(latents) * 32768).round(), sound * 32768)


def test_it_is_an_orthonormal_change_of_basis() -> None:
    ours = codec(hop=16, power=1.0)
    basis = torch.stack([ours.encode(row[None]).flatten() for row in torch.eye(48)])
    assert torch.allclose(basis @ basis.T, torch.eye(48), atol=1e-6)


def test_frames_are_those_of_the_mdct() -> None:
    """Against the sum over the window that the module's docstring gives."""
    hop, sound = 16, pcm(1, 64)
    found = codec(hop=hop, power=1.0).encode(sound)[:, 1, 0, 0].double()
    n, k = torch.arange(2 * hop).double(), torch.arange(hop).double()
    window = ((n + 0.5) * math.pi / (2 * hop)).sin()
    angle = (n + 0.5 - hop / 2).unsqueeze(1) * (k + 0.5) * math.pi / hop
    start = hop - hop // 2
    seen = sound[0, start : start + 2 * hop].double()
    expected = math.sqrt(2 / hop) * (window * seen) @ angle.cos()
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_changed_latent_fades_over_its_neighbours() -> None:
    """Frames overlap: an error has no edge at the border of a frame."""
    ours = codec(hop=32, power=1.0)
    latents = torch.zeros(32, 5, 1, 1)
    latents[3, 2] = 1.0
    sound = ours.decode(latents)[0]
    assert sound[:48].abs().max() == 0 and sound[112:].abs().max() == 0
    assert 0 < sound[48:64].abs().max() < 0.2 and sound[64:96].abs().max() > 0.2


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ConfigError, match="even hop"):
        MdctConfig(hop=15)
    with pytest.raises(ConfigError, match="power"):
        MdctConfig(power=2.0)
    with pytest.raises(ConfigError, match="gain"):
        MdctConfig(gain=0.0)
    ours = codec(2)
    with pytest.raises(EncoderError, match=r"takes float32 sound \[2, samples\].*\[1, 64\]"):
        ours.encode(torch.zeros(1, 64))
    with pytest.raises(EncoderError, match=r"70 samples are no whole number .* of 32"):
        ours.encode(torch.zeros(2, 70))
    with pytest.raises(EncoderError, match=r"latents \[64, t, 1, 1\], got \[32, 4, 1, 1\]"):
        ours.decode(torch.zeros(32, 4, 1, 1))


def test_the_fingerprint_follows_what_changes_latents() -> None:
    kinds = [codec(), codec(2), codec(hop=64), codec(power=0.7), codec(gain=2.0)]
    assert len({kind.fingerprint for kind in kinds}) == len(kinds)
    assert codec().fingerprint == codec().fingerprint
