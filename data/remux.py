"""Other containers to mp4: the coded streams are copied, nothing is encoded again."""

from __future__ import annotations

import io
from typing import Any

from kinodit.data.probe import MediumError
from kinodit.models.errors import MissingExtraError


def remux(data: bytes, demuxer: str) -> bytes:
    """The first video and the first audio stream of a container, copied into an mp4.

    Raises MediumError if there is no video or an mp4 cannot hold the streams.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("PyAV", "media", "reading video and sound") from error
    target = io.BytesIO()
    try:
        options = {"protocol_whitelist": ""}
        with (
            av.open(io.BytesIO(data), format=demuxer, options=options) as source,
            av.open(target, "w", format="mp4") as sink,
        ):
            streams = [*source.streams.video[:1], *source.streams.audio[:1]]
            if not source.streams.video:
                raise MediumError("there is no video stream in it")
            copies = {stream.index: sink.add_stream_from_template(stream) for stream in streams}
            packets = [packet for packet in source.demux(streams) if packet.size]
            _fill_decode_times(packets)
            for packet in packets:
                packet.stream = copies[packet.stream.index]
                sink.mux(packet)
    except (OSError, ValueError, av.FFmpegError) as error:
        if isinstance(error, MediumError):
            raise
        raise MediumError(f"its streams cannot be copied into an mp4: {error}") from error
    return target.getvalue()


def _fill_decode_times(packets: list[Any]) -> None:
    """Gives packets a decode time where the container has none: one duration before the next's.

    Matroska stores none; FFmpeg works them out from the first packet on that tells the order, and
    leaves those before it without. An mp4 must have them all.
    """
    following: dict[int, int] = {}
    for packet in reversed(packets):
        index = packet.stream.index
        if packet.dts is None:
            if index in following:
                packet.dts = following[index] - max(1, packet.duration or 0)
            else:
                packet.dts = packet.pts
        if packet.dts is not None:
            following[index] = packet.dts
