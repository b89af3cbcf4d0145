"""The wavelet codec: bit by bit lossless, orthonormal, standardised by subband."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kinodit.models.encoders.base import EncoderError, build_video_codec
from kinodit.models.encoders.haar import Haar
from kinodit.models.encoders.standardisation import MIN_STD, Standardisation
from kinodit.models.encoders.wavelet import WaveletCodec, WaveletConfig, fit_standardisation
from kinodit.models.errors import ConfigError

CPU = torch.device("cpu")
LEVELS = list(product((0, 1, 2), (0, 1, 3)))


def codec(**settings: object) -> WaveletCodec:
    built = build_video_codec(WaveletConfig(**settings), CPU)  # type: ignore[arg-type]
    assert isinstance(built, WaveletCodec)
    return built


def random_clip(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), generator=source, dtype=torch.uint8)


def natural_clip(frames: int, size: int, seed: int) -> Tensor:
    """A smooth moving pattern with a little grain: most energy is in slow, coarse change."""
    source = torch.Generator().manual_seed(seed)
    phase = torch.rand(3, generator=source) * 6
    grid = torch.arange(size) / size
    time = torch.arange(frames).reshape(-1, 1, 1, 1) / 8
    wave = torch.sin(6 * grid.reshape(1, -1, 1, 1) + time + phase) * torch.cos(
        4 * grid.reshape(1, 1, -1, 1) - time
    )
    grain = torch.randn(frames, size, size, 3, generator=source)
    return (128 + 90 * wave + 3 * grain).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("temporal", "spatial"), LEVELS)
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("power", [0.0, 0.6, 1.0])
def test_random_pixels_survive_bit_by_bit(
    temporal: int, spatial: int, alone: bool, power: float
) -> None:
    ours = codec(
        temporal_levels=temporal,
        spatial_levels=spatial,
        first_frame_alone=alone,
        standardise_power=power,
    )
    step = 2**temporal
    fitted = fit_standardisation(ours, [natural_clip(step + (alone and step > 1), 16, 1)])
    for frames in (1, 1 + 2 * step) if alone else (step, 3 * step):
        video = random_clip(frames, 8, 24)
        for one in (ours, fitted):
            latents = one.encode(video)
            assert latents.dtype == torch.float32
            assert latents.shape == (one.latent_channels, *one.latent_shape(frames, 8, 24))
            assert torch.equal(one.decode(latents), video)


def test_extreme_pixels_survive_a_standardisation_to_flat_clips() -> None:
    flat = fit_standardisation(codec(), [torch.full((3, 8, 8, 3), 200, dtype=torch.uint8)])
    board = (torch.arange(8 * 8 * 3 * 5).reshape(5, 8, 8, 3) % 2 * 255).to(torch.uint8)
    for video in (board, random_clip(5, 8, 8)):
        assert torch.equal(flat.decode(flat.encode(video)), video)


@pytest.mark.parametrize(("temporal", "spatial"), LEVELS)
@pytest.mark.parametrize("separable", [False, True])
def test_the_transform_is_an_orthonormal_rotation_of_a_block(
    temporal: int, spatial: int, separable: bool
) -> None:
    st, ss = 2**temporal, 2**spatial
    size = st * ss * ss
    blocks = torch.eye(size, dtype=torch.float64).reshape(size, 1, 1, st, ss, ss, 1)
    haar = Haar(temporal, spatial, separable)
    rows = haar.forward(blocks).reshape(size, size)
    torch.testing.assert_close(rows @ rows.T, torch.eye(size, dtype=torch.float64))
    back = haar.inverse(rows.reshape(size, 1, 1, size, 1))
    torch.testing.assert_close(back, blocks)


def test_subbands_cover_a_block_and_know_their_axes() -> None:
    bands = Haar(1, 2).subbands()
    assert [band.name for band in bands] == [
        "low", "2/h", "2/w", "2/hw", "1/t", "1/h", "1/th", "1/w", "1/tw", "1/hw", "1/thw",
    ]  # fmt: skip
    assert sum(band.size for band in bands) == 2 * 4 * 4
    ours = codec(first_frame_alone=False)
    rising = torch.arange(4).mul(40).to(torch.uint8)

    def strong(video: Tensor) -> set[str]:
        coefficients = ours.coefficients(video).abs().sum((0, 1, 2, 4))
        parts = torch.split(coefficients, [band.size for band in ours.subbands])
        return {
            band.name for band, part in zip(ours.subbands, parts, strict=True) if part.sum() > 1e-4
        }

    assert strong(rising.reshape(4, 1, 1, 1).expand(4, 8, 8, 3)) == {"low", "1/t"}
    assert strong(rising.repeat(2).reshape(1, 8, 1, 1).expand(4, 8, 8, 3)) == {"low", "1/h", "2/h"}
    assert strong(rising.repeat(2).reshape(1, 1, 8, 1).expand(4, 8, 8, 3)) == {"low", "1/w", "2/w"}


def test_a_still_clip_has_the_same_latents_as_its_first_frame() -> None:
    picture = random_clip(1, 8, 8)
    still = codec().encode(picture.expand(5, -1, -1, -1))
    image = codec().encode(picture)
    assert image.shape[1] == 1 and still.shape[1] == 3
    torch.testing.assert_close(still, image.expand(-1, 3, -1, -1), rtol=0, atol=1e-6)


def test_bits_do_not_depend_on_what_is_encoded_beside() -> None:
    video = random_clip(5, 32, 32)
    whole = codec().encode(video)
    part = codec().encode(video[:3, :16, 16:])
    assert torch.equal(whole[:, :2, :4, 4:], part)


def test_standardised_subbands_have_unit_variance() -> None:
    clips = [natural_clip(9, 32, seed) for seed in range(4)]
    fitted = fit_standardisation(codec(), clips)
    latents = torch.stack([fitted.encode(clip) for clip in clips])[:, :, 1:]
    channels = torch.unflatten(latents.transpose(0, 1).flatten(1), 0, (-1, 3))
    start = 0
    for band in fitted.subbands:
        part = channels[start : start + band.size].transpose(0, 1).flatten(1)
        start += band.size
        # The low band's first frames count in the fit and are left out here.
        bound = 1e-3 if band.tempo else 0.15
        assert part.std(1, unbiased=False).sub(1).abs().max() < bound, band.name


def test_a_power_below_one_keeps_more_energy_in_coarse_bands() -> None:
    clips = [natural_clip(9, 32, seed) for seed in range(4)]
    ratios = []
    for power in (1.0, 0.5, 0.0):
        fitted = fit_standardisation(codec(standardise_power=power), clips)
        latents = torch.stack([fitted.encode(clip) for clip in clips])
        variance = latents.var((0, 2, 3, 4), unbiased=False)
        assert variance.mean() == pytest.approx(1.0, abs=0.25)
        ratios.append(float(variance[:3].mean() / variance[-3:].mean()))
    assert ratios[0] == pytest.approx(1.0, abs=0.4)
    assert ratios[0] < ratios[1] < ratios[2]
    assert ratios[1] == pytest.approx(math.sqrt(ratios[0] * ratios[2]), rel=0.05)


def test_the_held_first_frame_does_not_count_for_bands_of_motion() -> None:
    clip = natural_clip(3, 16, 0)
    alone = fit_standardisation(codec(), [clip]).standardisation
    moving = fit_standardisation(codec(first_frame_alone=False), [clip[1:]]).standardisation
    assert alone is not None and moving is not None
    for one, other in zip(alone.subbands, moving.subbands, strict=True):
        if "t" in one.name:
            assert one.std == pytest.approx(other.std)


def test_bands_that_never_move_count_as_one_grey_level() -> None:
    fitted = fit_standardisation(codec(), [natural_clip(1, 16, seed) for seed in range(2)])
    assert fitted.standardisation is not None
    motion = [band for band in fitted.standardisation.subbands if "t" in band.name]
    assert motion and all(band.std == (MIN_STD,) * 3 for band in motion)


def test_statistics_are_stored_exactly_and_found_by_config(tmp_path: Path) -> None:
    fitted = fit_standardisation(codec(), [natural_clip(9, 32, 0), natural_clip(1, 16, 1)])
    assert fitted.standardisation is not None
    file = tmp_path / "wavelet.json"
    fitted.standardisation.save(file)
    assert Standardisation.load(file) == fitted.standardisation
    assert json.loads(file.read_text())["num_videos"] == 2
    again = codec(standardisation=str(file))
    video = random_clip(9, 32, 32)
    assert torch.equal(again.encode(video), fitted.encode(video))
    assert again.fingerprint == fitted.fingerprint


def test_fingerprint_follows_everything_that_changes_latents() -> None:
    plain = codec()
    fitted = fit_standardisation(plain, [natural_clip(9, 32, 0)])
    half = WaveletCodec(replace(plain.config, standardise_power=0.5), fitted.standardisation, CPU)
    images = codec(first_frame_alone=False)
    deeper = codec(spatial_levels=3)
    prints = {one.fingerprint for one in (plain, fitted, half, images, deeper)}
    assert len(prints) == 5
    assert codec().fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("settings", "shape", "words"),
    [
        ({}, (16, 8, 8), r"frames 16 does not fit .* 1 \+ a multiple of 2: use 15 or 17"),
        ({"temporal_levels": 2}, (2, 8, 8), "use 1 or 5"),
        ({"first_frame_alone": False}, (1, 8, 8), "takes a multiple of 2: use 2"),
        ({}, (1, 10, 8), "height 10 does not fit .* a multiple of 4: use 8 or 12"),
        ({}, (1, 8, 3), "width 3 does not fit .* use 4$"),
        ({"temporal_levels": 0}, (0, 8, 8), "frames 0 does not fit"),
    ],
)
def test_sizes_that_do_not_divide_are_named_with_those_that_do(
    settings: dict[str, object], shape: tuple[int, int, int], words: str
) -> None:
    with pytest.raises(EncoderError, match=words):
        codec(**settings).encode(random_clip(*shape))


def test_wrong_tensors_and_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="uint8 frames"):
        codec().encode(torch.zeros(1, 8, 8, 3))
    with pytest.raises(EncoderError, match=r"latents \[96, t, h, w\]"):
        codec().decode(torch.zeros(95, 1, 2, 2))
    with pytest.raises(EncoderError, match="at least one video"):
        fit_standardisation(codec(), [])
    for wrong in ({"temporal_levels": -1}, {"spatial_levels": 6}, {"standardise_power": 1.5}):
        with pytest.raises(ConfigError):
            codec(**wrong)


def test_a_standardisation_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "wavelet.json"
    with pytest.raises(EncoderError, match="cannot read the wavelet standardisation"):
        codec(standardisation=str(file))
    fitted = fit_standardisation(codec(), [natural_clip(3, 16, 0)]).standardisation
    assert fitted is not None
    fitted.save(file)
    with pytest.raises(EncoderError, match="measure it again with these levels"):
        codec(standardisation=str(file), spatial_levels=3)
    document = json.loads(file.read_text())
    document["subbands"][0]["std"] = [1.0, 0.0, 1.0]
    file.write_text(json.dumps(document))
    with pytest.raises(EncoderError, match="not above 0"):
        codec(standardisation=str(file))
    del document["subbands"][0]["std"]
    file.write_text(json.dumps(document))
    with pytest.raises(EncoderError, match="not a wavelet standardisation: KeyError"):
        codec(standardisation=str(file))
    file.write_text(json.dumps({**document, "schema": 9}))
    with pytest.raises(EncoderError, match="schema 9, this version reads 1"):
        codec(standardisation=str(file))
    file.write_text("{")
    with pytest.raises(EncoderError, match="is not JSON"):
        codec(standardisation=str(file))


def test_gains_raise_named_subbands_and_stay_lossless() -> None:
    clips = [natural_clip(4, 16, seed) for seed in range(3)]
    plain = codec(temporal_levels=2, first_frame_alone=False, standardise_power=0.0)
    raised = replace(plain.config, gains={"2/t": 4.0})
    fitted = fit_standardisation(plain, clips)
    louder = WaveletCodec(raised, fitted.standardisation, CPU)
    names = [band.name for band in plain.subbands]
    sizes = [band.size * 3 for band in plain.subbands]
    before = fitted.encode(clips[0]).split(sizes)
    after = louder.encode(clips[0]).split(sizes)
    ratios = [float(b.norm() / a.norm()) for a, b in zip(before, after, strict=True)]
    index = names.index("2/t")
    assert ratios[index] / ratios[0] == pytest.approx(4.0, rel=1e-5)
    total = torch.stack([louder.encode(clip) for clip in clips]).square().mean()
    assert 0.3 < float(total) < 3.0
    assert torch.equal(louder.decode(louder.encode(clips[0])), clips[0])
    assert louder.fingerprint != fitted.fingerprint


def test_gains_of_subbands_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="3/t"):
        WaveletConfig(temporal_levels=1, spatial_levels=1, gains={"3/t": 2.0})


def test_separable_tells_slow_change_from_fast_at_every_scale_and_stays_lossless() -> None:
    ours = codec(
        temporal_levels=2, spatial_levels=1, first_frame_alone=False, transform="separable"
    )
    assert [(band.name, band.tempo, band.size) for band in ours.subbands] == [
        (f"{space}@t{tempo}" if tempo else space, tempo, 2 if tempo == 1 else 1)
        for space in ("low", "1/h", "1/w", "1/hw")
        for tempo in (0, 2, 1)
    ]
    clip = random_clip(8, 8, 8)
    assert torch.equal(ours.decode(ours.encode(clip)), clip)
    halfway = torch.full((4, 2, 2, 3), 100, dtype=torch.uint8)
    halfway[2:, 0] = 200
    sizes = [band.size * 3 for band in ours.subbands]
    strong = [part.abs().max() > 1e-5 for part in ours.encode(halfway).flatten().split(sizes)]
    found = {band.name for band, is_strong in zip(ours.subbands, strong, strict=True) if is_strong}
    assert found == {"low", "low@t2", "1/h", "1/h@t2"}
    joint = codec(temporal_levels=2, spatial_levels=1, first_frame_alone=False)
    assert joint.fingerprint != ours.fingerprint


@pytest.mark.parametrize("transform", ["joint", "separable"])
@pytest.mark.parametrize("power", [0.0, 0.5])
def test_equalised_time_gives_each_tempo_the_energy_of_what_stands_still(
    transform: str, power: float
) -> None:
    clips = [natural_clip(4, 16, seed) for seed in range(6)]
    plain = codec(
        temporal_levels=2,
        first_frame_alone=False,
        transform=transform,
        equalise_time=True,
        standardise_power=power,
    )
    fitted = fit_standardisation(plain, clips)
    latents = torch.stack([fitted.encode(clip) for clip in clips]).transpose(0, 1).flatten(1)
    tempo = torch.tensor([band.tempo for band in fitted.subbands for _ in range(band.size * 3)])
    # A subband has one mean for all of its coefficients, so that energy is about that mean.
    energy = torch.stack([latents[tempo == level].square().sum() for level in range(3)])
    torch.testing.assert_close(energy, energy[:1].expand(3), rtol=1e-3, atol=0.0)
    assert float(latents.square().mean()) == pytest.approx(1, rel=1e-3)
    assert torch.equal(fitted.decode(fitted.encode(clips[0])), clips[0])
