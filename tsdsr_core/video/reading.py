"""Reading videos: what a file holds, found by going through it once, and its frames upright."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.error import InvalidDataError
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream
from torch import Tensor

from ..errors import InputError
from .colours import Coding, coding_of, to_rgb

log = logging.getLogger("tsdsr")

_TRUSTED = {"mov", "matroska", "avi"}
"""Containers that store their duration, so that a file that ends early shows; of others it is estimated."""
_TOLERANCE = Fraction(1, 2), Fraction(1, 50)
"""Seconds, and share of the duration, that a file may end before it: stored durations are not exact."""
_ONE = 1 << 16
"""1 in a display matrix."""


@dataclass(frozen=True)
class Turn:
    """What brings a stored frame upright: first the sides are swapped, then it is mirrored."""

    swaps: bool = False
    mirrors_x: bool = False
    mirrors_y: bool = False

    def applied(self, image: Tensor) -> Tensor:
        """``image`` ``(..., H, W)`` upright."""
        image = image.transpose(-1, -2) if self.swaps else image
        return image.flip([axis for axis, mirrors in ((-1, self.mirrors_x), (-2, self.mirrors_y)) if mirrors])


@dataclass(frozen=True)
class Clip:
    """What was found in a video file."""

    path: Path
    frames: int
    height: int
    width: int
    """Sides in pixels, upright."""
    turn: Turn
    coding: Coding
    aspect: Fraction
    """Width of a pixel over its height, upright."""


def read_clip(path: Path) -> Clip:
    """Decode a video once, so that damage shows before any work, and say what it holds.

    Raises:
        InputError: for a missing or damaged file, one without video, or one whose frames change their size, naming it.
    """
    count, first, turn, coding, end = 0, (0, 0), Turn(), None, Fraction(0)
    with opened(path) as (container, video):
        for packet in packets(container, *container.streams):
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream.index != video.index:
                continue
            for frame in packet.decode():
                if coding is None:
                    first, turn, coding = (frame.height, frame.width), turn_of(frame), coding_of(frame)
                    _warn(path, video, frame)
                if (frame.height, frame.width) != first:
                    raise InputError(
                        f"{path} changes from {first[1]}x{first[0]} to {frame.width}x{frame.height} pixels after {count} "
                        "frames: split it there"
                    )
                count += 1
        _check_end(path, container, video, end)
        aspect = video.sample_aspect_ratio or Fraction(1)
    if coding is None:
        raise InputError(f"{path} has no frames that can be decoded")
    height, width = first[::-1] if turn.swaps else first
    return Clip(path, count, height, width, turn, coding, 1 / aspect if turn.swaps else aspect)


def upright(frame: av.VideoFrame, turn: Turn) -> Tensor:
    """A frame as ``(1, 3, H, W)`` float32 in 0..1."""
    return turn.applied(to_rgb(frame))


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video file and its main video stream; what FFmpeg says of it in the block is an ``InputError`` that names the file."""
    try:
        mode = path.stat()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    if not stat.S_ISREG(mode.st_mode):  # a pipe would be waited for, and cannot be read twice
        raise InputError(f"{path} is not a file")
    if not mode.st_size:
        raise InputError(f"{path} is empty")
    try:
        # "file:", since other names with a colon are addresses to FFmpeg; playlists open no connection
        options = {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", container_options=options, metadata_errors="replace") as container:
            yield container, _main(path, container)
    except av.FFmpegError as error:
        said = "it is damaged, or of a kind that is not supported"
        if not isinstance(error, InvalidDataError):
            said = error.strerror or type(error).__name__
        raise InputError(f"{path} cannot be read as a video: {said}") from error


def packets(container: InputContainer, *streams: Stream) -> Iterator[Packet[Any]]:
    """The packets of ``streams``, in the file's order."""
    try:
        yield from container.demux(*streams)
    except IndexError:  # PyAV's, at the end of a file in which streams appeared on the way
        return


def _main(path: Path, container: InputContainer) -> VideoStream:
    """The stream that players show."""
    video = cast(VideoStream | None, container.streams.best("video"))
    if video is None or video.disposition & Disposition.attached_pic:
        raise InputError(f"{path} has no video stream")
    if video.codec_context is None:
        raise InputError(f"{path} cannot be read: this FFmpeg has no decoder for its video")
    video.thread_type = "AUTO"
    return video


def turn_of(frame: av.VideoFrame) -> Turn:
    """What a frame's display matrix asks for, in quarter turns; others are left as they are."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return Turn()
    a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5].tolist()
    if abs(a) == abs(d) == _ONE and b == c == 0:
        return Turn(False, a < 0, d < 0)
    if abs(b) == abs(c) == _ONE and a == d == 0:
        return Turn(True, c < 0, b < 0)
    return Turn()


def _warn(path: Path, video: VideoStream, frame: av.VideoFrame) -> None:
    if any(component.is_alpha for component in frame.format.components) or video.metadata.get("alpha_mode") == "1":
        log.warning("%s: left out its alpha channel, which results cannot hold", path)
    if frame.interlaced_frame:
        log.warning("%s is interlaced: deinterlace it first, or moving edges will show combing", path)


def _check_end(path: Path, container: InputContainer, video: VideoStream, end: Fraction) -> None:
    """Raise ``InputError`` where a file is cut off: it ends, after ``end`` seconds, before it should."""
    kind = container.format.name.partition(",")[0]
    if kind not in _TRUSTED or container.duration is None:
        return
    wanted = Fraction(container.duration + max(0, container.start_time or 0), av.time_base)
    if kind == "avi" and video.frames and video.average_rate:  # whose duration FFmpeg shortens to what is there
        wanted = video.frames / video.average_rate
    if end < wanted - max(_TOLERANCE[0], wanted * _TOLERANCE[1]):
        raise InputError(
            f"{path} is damaged: it ends after {float(end):.1f} of {float(wanted):.1f} seconds; repair it, or cut it to what "
            "is whole"
        )
