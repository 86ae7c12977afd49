"""Reading videos: what a file holds, found by going through it once, and its frames upright."""

from __future__ import annotations

import logging
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from av.error import InvalidDataError
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream
from torch import Tensor

from ..errors import InputError
from .colours import Coding, coding_of, to_rgb
from .timing import Clips, Timeline, find_joins, frame_step, frame_times, kind, last_duration, lay_out, packets
from .views import Views, views_of

log = logging.getLogger("tsdsr")

_TRUSTED = {"mov", "matroska", "avi"}
"""Containers that store their duration, so that a file that ends early shows; of others it is estimated."""
_TOLERANCE = Fraction(1, 2), Fraction(1, 50)
"""Seconds, and share of the duration, that a file may end before it: stored durations are not exact."""
_FRAMES = 2
"""That may be missing at the end without a warning; MP4's are counted."""
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
    height: int
    width: int
    """Sides in pixels, upright."""
    turn: Turn
    coding: Coding
    aspect: Fraction
    """Width of a pixel over its height, upright."""
    times: tuple[int, ...]
    """When each frame is shown in the result, in the units of its stream, from 0 on."""
    durations: tuple[int, ...]
    """How long each is shown, in the same units."""
    timeline: Timeline
    views: Views
    covers: tuple[tuple[int, bytes], ...]
    """Cover pictures: the index of the stream, and the file."""
    texts: Mapping[str, str]
    """Metadata of the file."""

    @property
    def frames(self) -> int:
        """How many there are."""
        return len(self.times)


class Decoder:
    """The frames of a video.  Where clips are joined it starts anew: a decoder drops frames that it still holds there."""

    def __init__(self, video: VideoStream, timeline: Timeline) -> None:
        self._context = video.codec_context
        self._clips = Clips(timeline.joins)
        self._clip = 0

    def frames(self, packet: Packet[Any]) -> list[tuple[int, av.VideoFrame]]:
        """What a packet completes, in the order in which it is shown: the number of the clip, and the frame."""
        clip, found = self._clips.of(packet), []
        if clip != self._clip:
            found = [(self._clip, frame) for frame in self._context.decode(None)]
            self._context.flush_buffers()
            self._clip = clip
        return found + [(clip, frame) for frame in packet.decode()]


def read_clip(path: Path) -> Clip:
    """Decode a video once, so that damage shows before any work, and say what it holds.

    Raises:
        InputError: for a missing or damaged file, one without video, or one whose frames change their size, naming it.
    """
    with opened(path) as (container, video):
        joins = find_joins(container, video)
    with opened(path) as (container, video):
        timeline = lay_out(container, video, joins)
    with opened(path) as (container, video):
        return _decoded(path, container, video, timeline)


def _decoded(path: Path, container: InputContainer, video: VideoStream, timeline: Timeline) -> Clip:
    indexed = len(video.index_entries)  # of fragments it grows on the way
    first, end, skipped, corrupt, own = None, Fraction(0), 0, 0, 0
    stamps: list[list[int | None]] = [[] for _ in timeline.offsets]
    decoding: list[int] = []
    covers = {stream.index for stream in container.streams.video if stream.disposition & Disposition.attached_pic}
    pictures = []
    decoder = Decoder(video, timeline)
    for packet in packets(container, *container.streams):
        if packet.pts is not None:
            end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
        if packet.stream.index in covers and packet.size:
            pictures.append((packet.stream.index, bytes(packet)))
        if packet.stream.index != video.index:
            continue
        if packet.size and packet.dts is not None:
            decoding.append(packet.dts)
        skipped += packet.is_discard
        for clip, frame in decoder.frames(packet):
            if first is None:
                first = frame
                _warn(path, video, frame)
            if (frame.height, frame.width) != (first.height, first.width):
                raise InputError(
                    f"{path} changes from {first.width}x{first.height} to {frame.width}x{frame.height} pixels after "
                    f"{sum(map(len, stamps))} frames: split it there"
                )
            stamps[clip].append(frame.pts)
            corrupt += frame.is_corrupt
            own = frame.duration
    if first is None:
        raise InputError(f"{path} has no frames that can be decoded")
    count = sum(map(len, stamps))
    _check_end(path, container, video, end)
    if kind(container) == "mov" and indexed - skipped > count:
        log.warning(
            "%s: %d of its %d frames are missing or cannot be decoded", path, indexed - skipped - count, indexed - skipped
        )
    if corrupt:
        log.warning("%s: %d of its %d frames are damaged", path, corrupt, count)
    times = frame_times(stamps, decoding, container, video, timeline)
    last = last_duration(own, times[-1], container, video, timeline)
    turn, aspect = turn_of(first), video.sample_aspect_ratio or Fraction(1)
    height, width = (first.width, first.height) if turn.swaps else (first.height, first.width)
    return Clip(
        path, height, width, turn, coding_of(first), 1 / aspect if turn.swaps else aspect, tuple(times),
        tuple(later - time for time, later in pairwise([*times, times[-1] + last])), timeline, views_of(first), tuple(pictures),
        dict(container.metadata),
    )  # fmt: skip


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
    """Where a file ends, after ``end`` seconds, before it should: it is cut off.

    Raises:
        InputError: where more is missing than inexact durations explain; of a little less a warning tells.
    """
    if kind(container) not in _TRUSTED or container.duration is None:
        return
    wanted = Fraction(container.duration + max(0, container.start_time or 0), av.time_base)
    if kind(container) == "avi" and video.frames and video.average_rate:  # whose duration FFmpeg shortens to what is there
        wanted = video.frames / video.average_rate
    said = f"it ends after {float(end):.1f} of {float(wanted):.1f} seconds"
    if end < wanted - max(_TOLERANCE[0], wanted * _TOLERANCE[1]):
        raise InputError(f"{path} is damaged: {said}; repair it, or cut it to what is whole")
    if kind(container) != "mov" and end < wanted - _FRAMES * frame_step(video) * cast(Fraction, video.time_base):
        log.warning("%s may be damaged: %s", path, said)
