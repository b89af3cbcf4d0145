"""Clips and pictures as files that any browser shows: mp4, PNG, GIF, and contact sheets.

The same pixels give the same bytes on one build of the encoders (one encoder thread, no dates), so
that two samplings can be compared by `cmp`.

Shape legend: T frames, H rows, W columns; pixels are uint8 RGB.
"""

from __future__ import annotations

import io
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from kinodit.models.errors import MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]
Sound = npt.NDArray[np.float32]

CRF = 10
"""x264's constant quality; 0 is lossless. At 10 a round trip stays within the loss of 4:2:0."""
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
"""Hz; sound of another rate is resampled to the next one."""
AAC_BLOCK = 1024
"""Samples of a block of AAC."""
KEYFRAME_INTERVAL = 8
"""Frames between keyframes: short, so that scrubbing in a page is immediate."""
BT709 = 1
"""The code of BT.709 for primaries, transfer and matrix (ITU-T H.273, tables 2 to 4)."""


def write_mp4(
    path: Path,
    video: Pixels | Tensor,
    fps: float,
    audio: tuple[Sound | Tensor, int] | None = None,
) -> None:
    """Write H.264 in 4:2:0, the one profile that all browsers play.

    video: uint8 [T, H, W, 3]; odd H or W grow by one repeated row or column (4:2:0 needs pairs).
    audio: (float32 [channels, samples] in [-1, 1], sample rate in Hz), written as AAC.

    Raises:
        MissingExtraError: PyAV is not installed.
        OSError: the file cannot be written.
    """
    av = require_av("writing mp4")
    frames = _pixels(video, 4)
    odd = (0, frames.shape[1] % 2), (0, frames.shape[2] % 2)
    frames = np.pad(frames, ((0, 0), *odd, (0, 0)), mode="edge")
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with (
        published(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options=options) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "crf": str(CRF),
            "g": str(KEYFRAME_INTERVAL),
            "threads": "1",
            "flags": "+bitexact",
        }
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        sound_stream = None
        if audio is not None:
            rate = min((r for r in AAC_RATES if r >= audio[1]), default=AAC_RATES[-1])
            sound_stream = container.add_stream("aac", rate=rate)
            sound_stream.layout = "mono" if audio[0].shape[0] == 1 else "stereo"
            sound_stream.options = {"flags": "+bitexact"}
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
        if audio is not None and sound_stream is not None:
            sound = np.asarray(audio[0], dtype=np.float32)
            resampler = av.AudioResampler("fltp", sound_stream.layout, rate, AAC_BLOCK)
            for frame in (*sound_frames(av, sound, audio[1], "fltp", AAC_BLOCK), None):
                for piece in resampler.resample(frame):
                    container.mux(sound_stream.encode(piece))
            container.mux(sound_stream.encode())


def read_mp4(path: Path) -> tuple[Pixels, float]:
    """All frames of a file that `write_mp4` wrote: (uint8 [T, H, W, 3], frames per second).

    Raises:
        MissingExtraError: PyAV is not installed.
    """
    av = require_av("reading mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate)


def write_png(path: Path, image: Pixels | Tensor) -> None:
    """Write uint8 [H, W, 3] as PNG.

    Raises:
        MissingExtraError: Pillow is not installed.
        OSError: the file cannot be written.
    """
    picture = _picture(_pixels(image, 3))
    with published(path) as temporary:
        picture.save(temporary, "PNG")


def gif_bytes(path: Path) -> bytes:
    """The mp4 at `path` as an endless GIF, for viewers that know no video.

    Raises:
        MissingExtraError: PyAV or Pillow is not installed.
    """
    video, fps = read_mp4(path)
    pictures = [_picture(frame) for frame in video]
    buffer = io.BytesIO()
    milliseconds = round(1000 / fps)
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0
    )
    return buffer.getvalue()


def contact_sheet(
    videos: Sequence[Pixels | Tensor],
    captions: Sequence[str],
    num_frames: int = 8,
    frame_height: int = 96,
    below: Sequence[Pixels | None] = (),
) -> Pixels:
    """One row per clip: its caption over a strip of up to `num_frames` frames evenly in time.

    videos: uint8 [T, H, W, 3] each, of any sizes. Frames are scaled to `frame_height` rows, in
    whole multiples where they are smaller, so that pixels stay square and crisp.
    below:  a picture, uint8 [h, w, 3], under each strip, as wide as it: a spectrogram

    Returns:
        uint8 [H, W, 3], for `write_png`.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    assert len(videos) == len(captions) > 0
    _require_pillow()
    from PIL import Image, ImageDraw, ImageFont

    gap, margin, font_size = 4, 16, 15
    font = ImageFont.load_default(font_size)
    strips = [
        _with_below(_strip(_pixels(video, 4), num_frames, frame_height, gap), picture, gap)
        for video, picture in itertools.zip_longest(videos, below)
    ]
    width = max(360, *(strip.width for strip in strips)) + 2 * margin
    columns = int((width - 2 * margin) / font.getlength("n"))
    texts = ["\n".join(textwrap.wrap(caption, columns)) or " " for caption in captions]
    line_height = font_size + 5
    heights = [
        line_height * (text.count("\n") + 1) + 6 + strip.height + margin
        for text, strip in zip(texts, strips, strict=True)
    ]
    sheet = Image.new("RGB", (width, sum(heights) + margin), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    tops = itertools.accumulate(heights, initial=margin)
    for text, strip, top in zip(texts, strips, tops, strict=False):
        draw.multiline_text((margin, top), text, fill=(30, 30, 28), font=font, spacing=5)
        sheet.paste(strip, (margin, top + line_height * (text.count("\n") + 1) + 6))
    return np.asarray(sheet)


def _strip(video: Pixels, num_frames: int, frame_height: int, gap: int) -> Image:
    """Frames of one clip side by side."""
    from PIL import Image

    count = min(num_frames, len(video))
    chosen = np.linspace(0, len(video) - 1, count).round().astype(int)
    height, width = video.shape[1:3]
    factor = max(1, frame_height // height) if height < frame_height else frame_height / height
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    strip = Image.new("RGB", (count * (size[0] + gap) - gap, size[1]), (250, 250, 248))
    for column, index in enumerate(chosen):
        strip.paste(_picture(video[index]).resize(size, method), (column * (size[0] + gap), 0))
    return strip


def _with_below(strip: Image, picture: Pixels | None, gap: int) -> Image:
    from PIL import Image

    if picture is None:
        return strip
    both = Image.new("RGB", (strip.width, strip.height + gap + len(picture)), (250, 250, 248))
    both.paste(strip, (0, 0))
    size = (strip.width, len(picture))
    both.paste(_picture(picture).resize(size, Image.Resampling.NEAREST), (0, strip.height + gap))
    return both


def sound_frames(
    av: Any, samples: npt.NDArray[Any], rate: int, sample_format: Literal["fltp", "s16"], size: int
) -> list[Any]:
    """`samples` [1 or 2, N] as PyAV's frames of `size` samples; "s16" is interleaved."""
    assert samples.ndim == 2 and samples.shape[0] in (1, 2), samples.shape
    layout = "mono" if samples.shape[0] == 1 else "stereo"
    frames = []
    for start in range(0, samples.shape[1], size):
        block = np.ascontiguousarray(samples[:, start : start + size])
        if sample_format == "s16":
            block = np.ascontiguousarray(block.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(block, format=sample_format, layout=layout)
        frame.sample_rate = rate
        frame.pts = start
        frame.time_base = Fraction(1, rate)
        frames.append(frame)
    return frames


def _pixels(values: Pixels | Tensor, num_dims: int) -> Pixels:
    array = values.cpu().numpy() if isinstance(values, Tensor) else values
    assert array.dtype == np.uint8, array.dtype
    assert array.ndim == num_dims and array.shape[-1] == 3 and array.size > 0, array.shape
    return array


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path` if all goes well: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _picture(image: Pixels) -> Image:
    _require_pillow()
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(image))


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("Pillow", "media", "writing pictures") from error


def require_av(purpose: str) -> Any:
    """PyAV's module. Raises MissingExtraError, naming `purpose`, if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("PyAV", "media", purpose) from error
    return av
