"""Extractors: tiny random models of transformers, saved to disk and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kinodit.models.encoders.base import EncoderError
from kinodit.models.encoders.features import Extractor, ExtractorConfig
from kinodit.models.errors import ConfigError

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def clip(seed: int = 0, frames: int = 6) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 20, 28, 3), generator=source, dtype=torch.uint8)


def extractor(folder: Path, kind: str) -> Extractor:
    return ExtractorConfig(kind=kind, path=str(folder)).build(CPU)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.Dinov2Config(**SMALL, image_size=28, patch_size=14)
    return save(tmp_path_factory.mktemp("dino"), seeded(lambda: transformers.Dinov2Model(config)))


def test_a_picture_is_the_middle_frame(dino: Path) -> None:
    ours = extractor(dino, "picture")
    video = clip()
    found = ours.of_video(video)
    assert found.shape == (16,) and found.dtype == torch.float64
    assert torch.equal(found, ours.of_video(video[3:4]))
    assert not torch.allclose(found, ours.of_video(clip(1)), atol=1e-4)
    (dino / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.3, 0.3]})
    )
    assert not torch.allclose(found, extractor(dino, "picture").of_video(video), atol=1e-6)
    (dino / "preprocessor_config.json").unlink()


def test_a_clip_is_seen_in_the_model_s_number_of_frames(tmp_path: Path) -> None:
    config = transformers.VideoMAEConfig(
        **SMALL, image_size=16, patch_size=8, num_frames=4, tubelet_size=2
    )
    folder = save(tmp_path, seeded(lambda: transformers.VideoMAEModel(config)))
    ours = extractor(folder, "video")
    video = clip(frames=7)
    found = ours.of_video(video)
    assert found.shape == (16,)
    assert torch.equal(found, ours.of_video(video[[0, 2, 4, 6]]))
    assert not torch.allclose(found, ours.of_video(video.flip(0)), atol=1e-6)


@pytest.fixture
def wav2vec(tmp_path: Path) -> Path:
    config = transformers.Wav2Vec2Config(
        **SMALL, conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    folder = save(tmp_path, seeded(lambda: transformers.Wav2Vec2Model(config)))
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(folder)
    return folder


def test_a_sound_is_resampled_to_what_the_model_hears(wav2vec: Path) -> None:
    folder = wav2vec
    ours = extractor(folder, "sound")
    time = torch.arange(16_000) / 16_000
    sound = torch.sin(2 * torch.pi * 300 * time)[None]
    found = ours.of_sound(sound, 16_000)
    assert found.shape == (16,) and found.dtype == torch.float64
    halved = ours.of_sound(sound[:, ::2], 8_000)
    other = ours.of_sound(torch.sin(2 * torch.pi * 3000 * time)[None], 16_000)
    assert (found - halved).norm() < 0.3 * (found - other).norm()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(EncoderError, match=r"no preprocessor_config\.json"):
        extractor(folder, "sound").of_sound(sound, 16_000)


@pytest.mark.parametrize(("flash", "click"), [(5, 5), (3, 6)])
def test_pictures_and_sounds_change_when_they_do(
    dino: Path, wav2vec: Path, flash: int, click: int
) -> None:
    config = ExtractorConfig(kind="synchrony", path=str(dino), sound_path=str(wav2vec))
    ours, fps, rate_hz = config.build(CPU), 8.0, 8_000
    video = torch.zeros(10, 20, 28, 3, dtype=torch.uint8)
    video[flash:] = clip(frames=1)
    # The sound is a part of a frame shorter than the clip, as codecs leave it.
    sound = torch.zeros(2, 9_900)
    tone = torch.sin(2 * torch.pi * 500 * torch.arange(9_900 - click * 1_000) / rate_hz)
    sound[:, click * 1_000 :] = tone
    seen, heard = ours.changes(video, fps, sound, rate_hz)
    assert seen.shape == heard.shape == (9,) and seen.dtype == heard.dtype == torch.float64
    # Change i is that from frame i to the next.
    assert int(seen.argmax()) == flash - 1 and float(seen.sum()) == float(seen[flash - 1])
    assert int(heard.argmax()) == click - 1
    assert config.build(CPU).fingerprint != extractor(dino, "picture").fingerprint


def test_what_does_not_fit_is_said(dino: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no path"):
        ExtractorConfig()
    with pytest.raises(ConfigError, match="synchrony needs a folder of a model of sounds there"):
        extractor(dino, "synchrony")
    with pytest.raises(ConfigError, match="no other kind takes one"):
        ExtractorConfig(path=str(dino), sound_path=str(dino))
    with pytest.raises(EncoderError, match="clip_score needs a CLIPModel"):
        extractor(dino, "clip_score")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["ViTForImage"]}))
    with pytest.raises(EncoderError, match="without a head"):
        extractor(tmp_path, "picture")
    other = ExtractorConfig(kind="video", path=str(dino)).build(CPU)
    assert other.fingerprint != extractor(dino, "picture").fingerprint


def test_clip_agreement_is_the_cosine_of_its_own_vectors(tmp_path: Path) -> None:
    config = transformers.CLIPConfig(
        text_config={**SMALL, "vocab_size": 60, "max_position_embeddings": 12, "eos_token_id": 59},
        vision_config={**SMALL, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    folder = save(tmp_path, seeded(lambda: transformers.CLIPModel(config)))
    vocabulary = {chr(97 + i): i for i in range(26)} | {
        f"{chr(97 + i)}</w>": 26 + i for i in range(26)
    }
    vocabulary |= {"<|startoftext|>": 58, "<|endoftext|>": 59}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.save_pretrained(folder)
    ours = extractor(folder, "clip_score")
    first, other = ours.agreement(clip(), "a b c"), ours.agreement(clip(), "x y z")
    assert -1 <= first <= 1 and first != other
    assert ours.agreement(clip(), "a " * 50) <= 1, "long captions are cut"
