"""Decoded samples -> latents and text features, in the training process and on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kinodit.data.cache import BoundedCache
from kinodit.data.colour import Planes
from kinodit.data.decode import DecodedSample, View
from kinodit.data.latents import REFERENCE, Encoded
from kinodit.data.packing import EncodedSample
from kinodit.data.tasks import pooled_name
from kinodit.models.encoders.base import (
    AudioCodec,
    Posterior,
    SplitTextEncoder,
    TextEncoder,
    TextFeatures,
    VideoCodec,
    posterior_of,
)
from kinodit.models.errors import ConfigError
from kinodit.models.random import sample_generator, uniform

__all__ = ["EncodedSample", "Encoders", "SampleEncoder", "pooled_name"]

TEXT, VIDEO, IMAGE, AUDIO, POOLED = "text", "video", "image", "audio", "text_pooled"
MIB = 1 << 20


@dataclass(frozen=True)
class Encoders:
    """The frozen encoders of a run.

    text:        captions to features
    more:        stream -> another encoder of the same captions
    video:       pixels to latents; None: pictures are not decoded
    has_image:   still images are a stream of their own beside clips; else they are clips of one
                 frame
    audio:       sound to latents; None: sound is not decoded
    audio_patch: latent frames of a token: sound is padded with silence to whole tokens
    """

    text: TextEncoder
    video: VideoCodec | None = None
    audio: AudioCodec | None = None
    audio_patch: int = 1
    has_image: bool = False
    more: Mapping[str, TextEncoder] = field(default_factory=dict)

    @property
    def texts(self) -> dict[str, TextEncoder]:
        """Stream -> encoder of captions."""
        return {TEXT: self.text, **self.more}

    def seconds(self, fps: float) -> dict[str, float]:
        """Stream -> seconds from one latent frame to the next, of clips of `fps`."""
        seconds = {}
        if self.video is not None:
            seconds[VIDEO] = self.video.stride[0] / fps
            if self.has_image:
                seconds[IMAGE] = seconds[VIDEO]
        if self.audio is not None:
            seconds[AUDIO] = self.audio.hop / self.audio.format.rate_hz
        return seconds

    @property
    def pictured(self) -> tuple[str, ...]:
        """The streams of pictures."""
        if self.video is None:
            return ()
        return (VIDEO, IMAGE) if self.has_image else (VIDEO,)

    @property
    def all(self) -> tuple[TextEncoder | VideoCodec | AudioCodec, ...]:
        """Those that there are."""
        every = (self.text, self.video, self.audio, *self.more.values())
        return tuple(e for e in every if e is not None)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Stream -> what names its encoder in a cache."""
        found = {name: encoder.fingerprint for name, encoder in self.texts.items()}
        if self.video is not None:
            found |= dict.fromkeys(self.pictured, self.video.fingerprint)
        if self.audio is not None:
            found[AUDIO] = f"{self.audio.fingerprint} patch {self.audio_patch}"
        return found

    def num_audio_frames(self, num_samples: int) -> int:
        """Latent frames, in whole tokens, of a sound of so many samples."""
        assert self.audio is not None
        return self.audio_patch * -(-num_samples // (self.audio.hop * self.audio_patch))


class SampleEncoder:
    """Encodes samples with frozen encoders.

    Each caption, clip and sound is encoded alone: in a batch of several, an encoder's last bits
    depend on the others, and so on what was cached before; a resumed run would differ.
    """

    def __init__(
        self,
        encoders: Encoders,
        seed: int,
        condition_dropout: float,
        caption_cache_mib: int = 256,
        latent_cache_mib: int = 0,
        text_dropout: Mapping[str, float] | None = None,
    ) -> None:
        """An encoder of samples.

        Args:
            encoders: of the run.
            seed: of the run.
            condition_dropout: share of samples that are given the empty caption instead of their
                own, so that the model learns the unconditional velocity that guidance needs.
            caption_cache_mib: memory for features of captions, on the encoder's device, MiB.
            latent_cache_mib: memory for latents of clips and sounds that are seen again in the same
                window and crop, on the codecs' device, MiB; 0 is none.
            text_dropout: stream -> share of samples in which its encoder alone is given the empty
                caption; drawn for each by itself.
        """
        if not 0 <= condition_dropout <= 1:
            raise ConfigError(f"condition_dropout is {condition_dropout}; it must be 0 to 1")
        self.encoders = encoders
        self._seed = seed
        self._condition_dropout = condition_dropout
        self._text_dropout = text_dropout or {}
        self._captions = BoundedCache[tuple[str, str], TextFeatures](
            caption_cache_mib * MIB, lambda f: _num_bytes(f.tokens) + _num_bytes(f.pooled)
        )
        self._prepared: dict[tuple[str, str], TextFeatures] = {}
        self._latents = BoundedCache[tuple[str, str, View], Posterior](
            latent_cache_mib * MIB,
            lambda p: _num_bytes(p.mean) + (0 if p.logvar is None else _num_bytes(p.logvar)),
        )

    def encode(self, pack: Sequence[DecodedSample]) -> list[EncodedSample]:
        """The samples of one pack as the model's inputs.

        Collective where the weights of an encoder of text are split.

        Raises:
            ConfigError: a sample's pictures or sound were decoded, which no encoder here takes.
            EncoderError: a codec does not take clips of this size.
        """
        self._prepare(
            (name, caption)
            for sample in pack
            for name in self._split
            for caption in (self._caption(sample, name),)
            if caption and self._kept(sample, name, caption) is None
        )
        return [self._encode(sample) for sample in pack]

    def prepare(self, captions: Sequence[str]) -> None:
        """Have `captions` ready for `text`, until the next call of this or of `encode`.

        Collective where the weights of an encoder of text are split: each rank brings its own
        captions. Without such an encoder nothing has to be prepared.
        """
        self._prepare((name, text) for name in self._split for text in captions if text)

    @property
    def _split(self) -> dict[str, SplitTextEncoder]:
        """Stream -> encoder of captions whose weights are split."""
        texts = self.encoders.texts.items()
        return {name: one for name, one in texts if isinstance(one, SplitTextEncoder)}

    def _prepare(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Features of (stream, caption) by split encoders, of all ranks' at once. Collective."""
        split = self._split
        if not split:
            return
        needed = list(dict.fromkeys(wanted))
        # Those that are remembered are held as well: the others might push them out.
        held = {key: features for key in needed if (features := self._captions.get(key))}
        for stream, encoder in split.items():
            missing = [text for name, text in needed if name == stream and (name, text) not in held]
            for text, features in zip(missing, encoder.encode(missing), strict=True):
                held[stream, text] = features
                self._captions.put((stream, text), features)
        self._prepared = held

    def text(self, caption: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Token features {"text": [L, D]} and conditions {"text_pooled": [D]} of a caption.

        Of each encoder: stream NAME has the condition NAME_pooled. Of a caption that is not empty,
        encoders whose weights are split have to be told before, by `prepare`.
        """
        return _named({name: self._features(caption, name) for name in self.encoders.texts})

    def _features(self, caption: str, name: str = TEXT) -> TextFeatures:
        features = self._prepared.get((name, caption)) or self._captions.get((name, caption))
        if features is None:
            encoder = self.encoders.texts[name]
            if isinstance(encoder, SplitTextEncoder):
                assert not caption, "a split encoder is asked outside of `prepare` and `encode`"
                return encoder.empty
            (features,) = encoder.encode([caption])
            self._captions.put((name, caption), features)
        return features

    def encode_whole(self, sample: DecodedSample) -> Encoded:
        """Everything that a sample's view and captions encode to: for caches on disk."""
        texts = {}
        for caption in sample.meta.captions:
            texts[caption.text] = self._features(caption.text)
        place = sample.view, sample.fps, sample.start_s
        return Encoded(self._posteriors(sample), texts, *place, tuple(self._pictures(sample)))

    def pictures(self, references: Tensor) -> list[Tensor]:
        """Latents [C, 1, h, w] of each of the pictures [R, H, W, 3] that a clip is drawn after."""
        assert self.encoders.video is not None
        return [self.encoders.video.encode(picture) for picture in references.split(1)]

    @property
    def device(self) -> torch.device:
        """That of the encoders."""
        return self._features("").tokens.device

    def _encode(self, sample: DecodedSample) -> EncodedSample:
        text, conditions = _named({name: self._given(sample, name) for name in self.encoders.texts})
        latents = {
            stream: posterior.draw(sample_generator(self._seed, sample.key, f"posterior/{stream}"))
            for stream, posterior in self._posteriors(sample).items()
        }
        pictures = [
            one.draw(sample_generator(self._seed, sample.key, f"posterior/{REFERENCE}{number}"))
            for number, one in enumerate(self._pictures(sample))
        ]
        seconds = self.encoders.seconds(sample.fps)
        return EncodedSample(
            key=sample.key,
            latents=latents,
            seconds={name: seconds[name] for name in latents},
            text=text,
            conditions=conditions,
            references={self._pictured(sample): pictures} if pictures else {},
        )

    def _given(self, sample: DecodedSample, name: str) -> TextFeatures:
        """What one encoder makes of a sample's caption, or of the empty one where it is dropped."""
        caption = self._caption(sample, name)
        kept = self._kept(sample, name, caption)
        return self._features(caption, name) if kept is None else kept.to(self.device)

    def _caption(self, sample: DecodedSample, name: str) -> str:
        """What one encoder is given of a sample: its caption, or the empty one."""
        draw = uniform(sample_generator(self._seed, sample.key, "condition_dropout"))
        caption = "" if draw < self._condition_dropout else sample.caption
        dropout = self._text_dropout.get(name, 0.0)
        source = sample_generator(self._seed, sample.key, f"condition_dropout/{name}")
        return "" if dropout and uniform(source) < dropout else caption

    def _kept(self, sample: DecodedSample, name: str, caption: str) -> TextFeatures | None:
        """What a cache on disk has of it."""
        return sample.encoded.texts.get(caption) if sample.encoded and name == TEXT else None

    def _pictures(self, sample: DecodedSample) -> list[Posterior]:
        """What is known of the latents of its reference pictures."""
        if sample.encoded is not None:
            return [kept.to(self.device) for kept in sample.encoded.references]
        if sample.references is None:
            return []
        codec = self.encoders.video
        if codec is None:
            raise _unwanted(sample, "reference pictures", "data.max_references=0")
        encode = partial(posterior_of, codec)
        return [
            self._cached(sample, f"{REFERENCE}{number}", picture, encode)
            for number, picture in enumerate(sample.references.split(1))
        ]

    def _posteriors(self, sample: DecodedSample) -> dict[str, Posterior]:
        """Stream -> what is known of its latents."""
        if sample.encoded is not None:
            device = self.device
            return {name: kept.to(device) for name, kept in sample.encoded.latents.items()}
        found: dict[str, Posterior] = {}
        video: Tensor | Planes | None = sample.planes if sample.video is None else sample.video
        if video is not None:
            codec = self.encoders.video
            if codec is None:
                raise _unwanted(sample, "pictures", "data.use_video=false")
            stream = self._pictured(sample)
            found[stream] = self._cached(sample, stream, video, partial(posterior_of, codec))
        if sample.audio is not None:
            if self.encoders.audio is None:
                raise _unwanted(sample, "sound", "data.use_audio=false")
            found[AUDIO] = self._cached(sample, AUDIO, sample.audio, self._sound)
        return found

    def _pictured(self, sample: DecodedSample) -> str:
        """The stream of a sample's pictures."""
        return IMAGE if self.encoders.has_image and sample.meta.modality == "image" else VIDEO

    def _sound(self, sound: Tensor) -> Posterior:
        audio = self.encoders.audio
        assert audio is not None
        num_samples = self.encoders.num_audio_frames(sound.shape[1]) * audio.hop
        padding = (0, num_samples - sound.shape[1])
        return posterior_of(audio, torch.nn.functional.pad(sound, padding))

    def _cached(
        self,
        sample: DecodedSample,
        stream: str,
        media: Tensor | Planes,
        encode: Callable[[Tensor], Posterior],
    ) -> Posterior:
        name = stream, sample.ref.sample_id, sample.view
        posterior = self._latents.get(name)
        if posterior is None:
            whole = media.to_rgb(self.device) if isinstance(media, Planes) else media
            posterior = encode(whole)
            self._latents.put(name, posterior)
        return posterior


def _named(
    features: Mapping[str, TextFeatures],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Streams of tokens and the condition vectors that come with them."""
    return (
        {name: one.tokens for name, one in features.items()},
        {pooled_name(name): one.pooled for name, one in features.items()},
    )


def _unwanted(sample: DecodedSample, what: str, setting: str) -> ConfigError:
    return ConfigError(
        f"the {what} of sample {sample.ref.sample_id} were decoded, but no encoder takes them: "
        f"set {setting}"
    )


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
