"""Videos made of videos: each frame changed, the sound and what else the container holds copied."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import torch.nn.functional as F
from av.codec.codec import UnknownCodecError
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream
from torch import Tensor

from ..errors import InputError
from ..system.atomic import write_files
from .colours import Coding, to_frame
from .formats import WRITTEN
from .reading import Clip, opened, packets, upright

log = logging.getLogger("tsdsr")

Change = Callable[[Tensor], Tensor]
"""From a frame ``(1, 3, H, W)`` to another of any size, both RGB in 0..1."""

_ENCODERS = {
    8: ("libx264", {"crf": "16", "rc-lookahead": "20"}), 10: ("libx265", {"crf": "16", "x265-params": "log-level=none"}),
}  # fmt: skip
"""By bits per channel: few players show H.264 of 10 bits.  At this quality losses are hardly seen; the frames that x264
looks ahead by are most of the memory that writing takes."""
_APPLE = "hvc1"
"""The tag of HEVC that Apple's players want in MP4 and MOV."""
_OF_THE_FILE = {"major_brand", "minor_version", "compatible_brands", "encoder"}
"""Metadata that describe the old file, not its content."""
_OF_THE_STREAM = ("language", "title", "handler_name")


def even(size: tuple[int, int]) -> tuple[int, int]:
    """``size`` with both sides even, as YUV 4:2:0 wants them: odd ones get a row or column more."""
    return size[0] + size[0] % 2, size[1] + size[1] % 2


def write_clip(clip: Clip, target: Path, size: tuple[int, int], change: Change, progress: Callable[[], Any]) -> None:
    """Write ``clip`` with each frame changed, all or nothing, one frame at a time; time stamps stay as they are.

    Args:
        size: (height, width) of what ``change`` gives.
        progress: called after each frame.

    Raises:
        InputError: for a suffix, size or sound that cannot be written, before the first frame, or damage in ``clip``.
        OSError: where ``target`` cannot be written, with the reason.
    """
    container = WRITTEN.get(target.suffix.lower())
    if container is None:
        raise InputError(f"{target}: unknown format; expected one of {', '.join(WRITTEN)}")
    write_files({target: lambda temporary: _write(clip, temporary, (target, container), size, change, progress)})


def _write(
    clip: Clip, temporary: Path, named: tuple[Path, str], size: tuple[int, int], change: Change, progress: Callable[[], Any]
) -> None:
    target, container = named
    with opened(clip.path) as (source, video), _sink(temporary, target, container) as sink:
        height, width = even(size)
        with _writing(target, f"{_ENCODERS[clip.coding.bits][0]} video of {width}x{height} pixels"):
            encoder = _add_video(sink, video, clip, (height, width))
            copied = _add_copies(sink, source, video, target)
            sink.start_encoding()
        clock = _Clock(source, video)
        for packet in packets(source, video, *(stream for stream in source.streams if stream.index in copied)):
            if packet.stream.index in copied:
                if packet.size:  # else it only marks the end
                    clock.shift(packet)
                    packet.stream = copied[packet.stream.index]
                    with _writing(target):
                        sink.mux(packet)
                continue
            for frame in packet.decode():
                changed = _coded(change(upright(frame, clip.turn)), clip.coding)
                changed.pts, changed.time_base = clock.stamp(frame), video.time_base
                with _writing(target):
                    sink.mux(clock.timed(encoder.encode(changed)))
                progress()
        with _writing(target):
            sink.mux(clock.timed(encoder.encode(None)))
            sink.close()


def _coded(rgb: Tensor, coding: Coding) -> av.VideoFrame:
    height, width = even((rgb.shape[2], rgb.shape[3]))
    return to_frame(F.pad(rgb, (0, width - rgb.shape[3], 0, height - rgb.shape[2]), mode="replicate"), coding)


class _Clock:
    """Time stamps of the result: those of the source, from 0 on, each later than the one before."""

    def __init__(self, source: InputContainer, video: VideoStream) -> None:
        self._start = Fraction(source.start_time or 0, av.time_base)
        unit = cast(Fraction, video.time_base)
        self._offset = self._in_units(unit)
        rate = video.guessed_rate or video.average_rate or Fraction(25)
        self._step = max(1, round(1 / (rate * unit)))
        self._last: int | None = None
        self._durations: dict[int, int] = {}
        """Of the frames in the encoder, by time stamp."""

    def stamp(self, frame: av.VideoFrame) -> int:
        """The time stamp of a decoded frame, in the units of its stream."""
        after = 0 if self._last is None else self._last + 1
        wanted = frame.pts
        if wanted is None:
            wanted = self._offset if self._last is None else self._last + self._step + self._offset
        self._last = max(after, wanted - self._offset)
        self._durations[self._last] = frame.duration
        return self._last

    def timed(self, encoded: list[Packet[Any]]) -> list[Packet[Any]]:
        """Packets of the encoder with the durations of their frames, which it loses."""
        for packet in encoded:
            packet.duration = self._durations.pop(packet.pts, 0) if packet.pts is not None else 0
        return encoded

    def shift(self, packet: Any) -> None:
        """Let the time stamps of a copied packet, if it has any, start as those of the frames do."""
        offset = self._in_units(packet.time_base)
        dts, pts = packet.dts if packet.dts is not None else packet.pts, packet.pts
        packet.dts = None if dts is None else dts - offset
        packet.pts = None if pts is None else pts - offset

    def _in_units(self, time_base: Fraction) -> int:
        return round(self._start / time_base)


@contextmanager
def _sink(temporary: Path, target: Path, container: str) -> Iterator[OutputContainer]:
    """A file to be written; the block closes it, or it is let go after an error."""
    with _writing(target):
        sink = av.open(f"file:{temporary}", "w", format=container, metadata_errors="replace")
    try:
        yield sink
    except BaseException:
        with suppress(av.FFmpegError, ValueError):
            sink.close()
        raise


@contextmanager
def _writing(target: Path, what: str = "a video") -> Iterator[None]:
    """What FFmpeg says in the block is about ``target``: an ``OSError`` where the system refuses, else an ``InputError``."""
    try:
        yield
    except av.FFmpegError as error:
        if error.errno in errno.errorcode and error.errno != errno.EINVAL:
            raise OSError(error.errno, error.strerror) from error
        raise InputError(f"{target} cannot be written as {what}: {error.strerror}") from error


def _add_video(sink: OutputContainer, video: VideoStream, clip: Clip, size: tuple[int, int]) -> VideoStream:
    name, options = _ENCODERS[clip.coding.bits]
    rate = video.average_rate or video.guessed_rate or Fraction(25)
    try:
        encoder: Any = sink.add_stream(name, rate=rate, options=dict(options))
    except UnknownCodecError:
        raise InputError(f"this PyAV comes without the encoder {name}: install the av package from PyPI") from None
    encoder.height, encoder.width = size
    encoder.pix_fmt = clip.coding.pixel_format
    context = encoder.codec_context
    context.time_base = encoder.time_base = video.time_base
    if clip.frames < 3:
        context.max_b_frames = 0  # x265 would not know when to decode so few
    context.sample_aspect_ratio = clip.aspect
    context.color_range = 2 if clip.coding.full else 1
    context.colorspace = clip.coding.matrix
    context.color_primaries, context.color_trc = clip.coding.primaries, clip.coding.transfer
    if name == "libx265" and sink.format.name in ("mp4", "mov"):
        context.codec_tag = _APPLE
    encoder.metadata.update({key: video.metadata[key] for key in _OF_THE_STREAM if key in video.metadata})
    return encoder


def _add_copies(sink: OutputContainer, source: InputContainer, video: VideoStream, target: Path) -> dict[int, Stream]:
    """Streams of ``sink`` for what is copied, by index in ``source``; texts and chapters too.

    Raises:
        InputError: where the container cannot hold the sound, and MKV may.
    """
    copied: dict[int, Stream] = {}
    lost = []
    for stream in source.streams:
        if stream.index == video.index:
            continue
        name = getattr(stream.codec_context, "name", None) or stream.name or "unknown"
        new = _copy_of(stream, sink)
        if new is not None:
            copied[stream.index] = new
        elif stream.type == "audio" and stream.codec_context is not None and sink.format.name != "matroska":
            raise InputError(f"{target}: {target.suffix} cannot hold the sound of the input ({name}); write .mkv")
        else:
            lost.append(f"{stream.type} ({name})")
    if lost:
        log.warning("%s: left out %s", target, ", ".join(dict.fromkeys(lost)))
    sink.metadata.update({key: value for key, value in source.metadata.items() if key not in _OF_THE_FILE})
    sink.set_chapters(source.chapters())
    return copied


def _copy_of(stream: Stream, sink: OutputContainer) -> Stream | None:
    """A stream that takes the packets of ``stream`` as they are, where the container can hold them."""
    cover = stream.type == "video" and stream.disposition & Disposition.attached_pic
    if not (cover or stream.type in ("audio", "subtitle") or (stream.type == "attachment" and sink.format.name == "matroska")):
        return None
    try:
        new = sink.add_stream_from_template(stream, opaque=True)
    except ValueError:
        return None
    new.disposition = stream.disposition
    new.metadata.update(stream.metadata)
    return new
