"""Every allowed autoencoder class, tiny and random, saved to disk and read back."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kinodit.models.encoders.base import EncoderError, build_video_codec
from kinodit.models.encoders.video_vae import FAMILIES, DiffusersVae, DiffusersVaeConfig
from kinodit.models.errors import MissingExtraError

diffusers = pytest.importorskip("diffusers")

CPU = torch.device("cpu")
FOUR = (8, 8, 8, 8)
ONES = (1, 1, 1, 1, 1)

Case = tuple[dict[str, Any], tuple[int, int, int, int], tuple[int, int, int, int]]

# Arguments of the tiny autoencoder, a clip [T, H, W, 3] that fits, and the latents it must give.
CASES: dict[str, Case] = {
    "AutoencoderKL": (
        {
            "block_out_channels": FOUR,
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "scaling_factor": 1.5,
            "shift_factor": 0.25,
        },
        (3, 32, 48, 3),
        (4, 3, 4, 6),
    ),
    "AutoencoderKLCogVideoX": (
        {
            "latent_channels": 4,
            "block_out_channels": FOUR,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "scaling_factor": 0.7,
        },
        (9, 32, 48, 3),
        (4, 3, 4, 6),
    ),
    "AutoencoderKLHunyuanVideo": (
        {
            "latent_channels": 4,
            "block_out_channels": FOUR,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "scaling_factor": 0.5,
        },
        (5, 32, 48, 3),
        (4, 2, 4, 6),
    ),
    "AutoencoderKLHunyuanVideo15": (
        {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8, 8), "layers_per_block": 1},
        (5, 32, 48, 3),
        (4, 2, 2, 3),
    ),
    "AutoencoderKLLTX2Video": (
        {
            "latent_channels": 8,
            "block_out_channels": FOUR,
            "decoder_block_out_channels": (8, 16, 32),
            "layers_per_block": ONES,
            "decoder_layers_per_block": (1, 1, 1, 1),
            "spatial_compression_ratio": 32,
            "temporal_compression_ratio": 8,
        },
        (9, 64, 96, 3),
        (8, 2, 2, 3),
    ),
    "AutoencoderKLLTXVideo": (
        {
            "latent_channels": 8,
            "block_out_channels": FOUR,
            "decoder_block_out_channels": FOUR,
            "layers_per_block": ONES,
            "decoder_layers_per_block": ONES,
            "scaling_factor": 1.25,
        },
        (9, 32, 64, 3),
        (8, 2, 1, 2),
    ),
    "AutoencoderKLMochi": (
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "layers_per_block": ONES,
            "latents_mean": (0.5, -0.5, 0.0, 1.0),
            "latents_std": (2.0, 1.0, 0.5, 1.0),
        },
        (7, 16, 24, 3),
        (4, 2, 2, 3),
    ),
    "AutoencoderKLWan": (
        {
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
            "latents_mean": [0.5, -0.5, 0.0, 1.0],
            "latents_std": [2.0, 1.0, 0.5, 1.0],
        },
        (5, 32, 48, 3),
        (4, 2, 4, 6),
    ),
}


def clip(shape: tuple[int, ...]) -> Tensor:
    source = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, shape, generator=source, dtype=torch.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(class_name: str) -> Path:
        if class_name not in made:
            made[class_name] = tmp_path_factory.mktemp(class_name)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                vae = getattr(diffusers, class_name)(**CASES[class_name][0])
            for name, buffer in vae.named_buffers():
                if name == "latents_mean":
                    buffer.fill_(0.5)
                if name == "latents_std":
                    buffer.fill_(2.0)
            vae.save_pretrained(made[class_name])
        return made[class_name]

    return save


def codec(folder: Path, **settings: Any) -> DiffusersVae:
    built = build_video_codec(DiffusersVaeConfig(path=str(folder), **settings), CPU)
    assert isinstance(built, DiffusersVae)
    return built


def test_every_allowed_class_is_tried() -> None:
    assert set(CASES) == set(FAMILIES)


@pytest.mark.parametrize("class_name", sorted(CASES))
def test_clips_and_images_go_through_and_come_back_in_shape(
    class_name: str, saved: Callable[[str], Path]
) -> None:
    vae = codec(saved(class_name))
    _, clip_shape, latent_shape = CASES[class_name]
    for frames, t in ((clip_shape[0], latent_shape[1]), (1, 1)):
        video = clip((frames, *clip_shape[1:]))
        latents = vae.encode(video)
        assert latents.dtype == torch.float32
        assert tuple(latents.shape) == (latent_shape[0], t, *latent_shape[2:])
        assert vae.latent_shape(*video.shape[:3]) == tuple(latents.shape[1:])
        assert vae.latent_channels == latents.shape[0]
        back = vae.decode(latents)
        assert back.dtype == torch.uint8 and back.shape == video.shape
        assert torch.equal(vae.encode(video), latents)
        assert torch.equal(vae.decode(latents), back)


@pytest.mark.parametrize("class_name", sorted(CASES))
def test_latents_are_normalised_as_the_class_says_and_decode_undoes_it(
    class_name: str, saved: Callable[[str], Path]
) -> None:
    vae = codec(saved(class_name))
    arguments, clip_shape, _ = CASES[class_name]
    video = clip(clip_shape)
    raw = getattr(diffusers, class_name).from_pretrained(saved(class_name)).eval()
    pixels = (video.float() / 127.5 - 1).permute(3, 0, 1, 2)
    framewise = class_name == "AutoencoderKL"
    batch = pixels.transpose(0, 1) if framewise else pixels.unsqueeze(0)
    with torch.no_grad():
        z = raw.encode(batch).latent_dist.mode()
        expected_frames = raw.decode(z).sample
    z = z.transpose(0, 1) if framewise else z.squeeze(0)
    if "LTX" in class_name:
        expected = (z - 0.5) * arguments.get("scaling_factor", 1.0) / 2.0
    elif "latents_mean" in arguments:
        mean, std = (
            torch.tensor(arguments[key]).reshape(-1, 1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        expected = (z - mean) / std
    else:
        factor = arguments.get("scaling_factor", raw.config.get("scaling_factor"))
        expected = (z - arguments.get("shift_factor", 0.0)) * factor
    latents = vae.encode(video)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)
    frames = expected_frames if framewise else expected_frames.squeeze(0).transpose(0, 1)
    expected_pixels = ((frames.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255)
    difference = (vae.decode(latents).float() - expected_pixels).abs().max()
    assert difference <= 1


def test_posterior_samples_are_a_function_of_the_clip(saved: Callable[[str], Path]) -> None:
    folder = saved("AutoencoderKLWan")
    video = clip((5, 32, 32, 3))
    mean = codec(folder).encode(video)
    sampled = codec(folder, posterior="sample")
    first = sampled.encode(video)
    torch.rand(3)
    assert torch.equal(first, sampled.encode(video))
    assert not torch.equal(first, mean)
    other = video.clone()
    other[0, 0, 0, 0] ^= 1
    gap = (sampled.encode(other) - codec(folder).encode(other)) - (first - mean)
    assert gap.abs().max() > 0.1


def test_weights_on_the_host_between_uses_change_nothing(saved: Callable[[str], Path]) -> None:
    folder = saved("AutoencoderKLWan")
    ours, theirs = codec(folder, offload=True), codec(folder)
    video = clip(CASES["AutoencoderKLWan"][1])
    latents = ours.encode(video)
    assert torch.equal(latents, theirs.encode(video))
    assert torch.equal(ours.decode(latents), theirs.decode(latents))
    assert ours.fingerprint == theirs.fingerprint


def test_decoding_leaves_the_process_s_own_draws_alone(saved: Callable[[str], Path]) -> None:
    vae = codec(saved("AutoencoderKLHunyuanVideo"))
    latents = vae.encode(clip((1, 16, 16, 3)))
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    vae.decode(latents)
    assert torch.equal(torch.rand(4), expected)


def test_an_ltx_decoder_that_injects_noise_and_reads_a_level_is_deterministic(
    tmp_path: Path,
) -> None:
    arguments = dict(CASES["AutoencoderKLLTXVideo"][0])
    arguments.update(timestep_conditioning=True, decoder_inject_noise=(True,) * 5)
    vae = diffusers.AutoencoderKLLTXVideo(**arguments)
    for name, parameter in vae.named_parameters():
        if "per_channel_scale" in name:
            parameter.data.fill_(1.0)
    vae.save_pretrained(tmp_path)
    ours = codec(tmp_path)
    latents = ours.encode(clip((9, 32, 32, 3)))
    first = ours.decode(latents)
    torch.rand(1)
    assert torch.equal(ours.decode(latents), first)


def test_fingerprint_follows_weights_and_settings_not_the_place(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = saved("AutoencoderKLWan")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    fingerprint = codec(folder).fingerprint
    assert codec(copy).fingerprint == fingerprint
    assert codec(folder, posterior="sample").fingerprint != fingerprint
    weights = next(copy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert codec(copy).fingerprint != fingerprint


@pytest.mark.parametrize(
    ("class_name", "shape", "words"),
    [
        ("AutoencoderKLWan", (6, 32, 32, 3), "frames 6 does not fit.*use 5 or 9"),
        ("AutoencoderKLCogVideoX", (5, 32, 32, 3), "frames 5 does not fit.*use 1 or 9"),
        ("AutoencoderKLWan", (5, 36, 32, 3), "height 36 does not fit.*use 32 or 40"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    class_name: str, shape: tuple[int, ...], words: str, saved: Callable[[str], Path]
) -> None:
    with pytest.raises(EncoderError, match=words):
        codec(saved(class_name)).encode(clip(shape))


def test_a_folder_that_is_not_there_or_not_allowed_is_refused(
    tmp_path: Path, saved: Callable[[str], Path]
) -> None:
    with pytest.raises(EncoderError, match=r"no config\.json in .*nothing is downloaded"):
        codec(tmp_path / "absent")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(EncoderError, match="UNet2DModel; known video autoencoders are"):
        codec(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(EncoderError, match="pickled weights are not read"):
        codec(tmp_path)


def test_weights_of_another_model_are_refused(saved: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved("AutoencoderKLWan")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(next(folder.glob("*.safetensors")))
    dropped = sorted(weights)[0]
    del weights[dropped]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(EncoderError, match="lack 1 tensors"):
        codec(tmp_path)


def test_a_missing_library_names_its_extra(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("AutoencoderKLWan")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kinodit\[encoders\]'"):
        codec(folder)
