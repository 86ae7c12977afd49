"""When the frames and the sound of a video are shown: clips joined in one file, time stamps that go back, the last frame."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any, cast

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

_JOINABLE = {"mpegts", "mpeg", "flv"}
"""Containers without an index, whose files can be joined byte by byte; time stamps begin anew with each clip."""
_BACK, _AHEAD = Fraction(1, 10), Fraction(10)
"""Seconds that time stamps go back or ahead where another clip begins; what is less is taken for inexact."""


@dataclass(frozen=True)
class Timeline:
    """Where another clip begins in a file, and what brings the time stamps of all clips onto one time."""

    start: Fraction = Fraction(0)
    """Seconds at which the file starts, 0 in the result."""
    joins: tuple[int, ...] = ()
    """Positions in the file, in bytes, from which on packets belong to the next clip."""
    offsets: tuple[Fraction, ...] = (Fraction(0),)
    """Seconds that are added to the time stamps, by clip."""

    def added(self, clip: int, unit: Fraction) -> int:
        """What is added to time stamps counted in ``unit``."""
        return round((self.offsets[clip] - self.start) / unit)


class Clips:
    """Which of the joined clips a packet belongs to."""

    def __init__(self, joins: tuple[int, ...]) -> None:
        self._joins = joins
        self._last: dict[int, int] = {}

    def of(self, packet: Packet[Any]) -> int:
        """Its number; a packet whose position is not known belongs to that of the one before in its stream."""
        if packet.pos is not None:
            self._last[packet.stream.index] = bisect_right(self._joins, packet.pos)
        return self._last.get(packet.stream.index, 0)


def kind(container: InputContainer) -> str:
    """FFmpeg's first name of a container."""
    return container.format.name.partition(",")[0]


def packets(container: InputContainer, *streams: Any) -> Iterator[Packet[Any]]:
    """The packets of ``streams``, in the file's order."""
    try:
        yield from container.demux(*streams)
    except IndexError:  # PyAV's, at the end of a file in which streams appeared on the way
        return


@dataclass
class _Track:
    """Where the time stamps of a stream jump."""

    last: Fraction | None = None
    position: int = -1
    jumps: list[tuple[int, int, bool]] = field(default_factory=list)
    """Of each: the position of the packet before and of the one after, and whether it goes back."""

    def see(self, packet: Packet[Any]) -> None:
        stamp = packet.dts if packet.dts is not None else packet.pts
        if stamp is None:
            return
        now = stamp * packet.time_base
        position = self.position if packet.pos is None else packet.pos
        if self.last is not None and not self.last - _BACK < now < self.last + _AHEAD:
            self.jumps.append((self.position, position, now < self.last))
        self.last, self.position = now, position


def find_joins(container: InputContainer, video: VideoStream) -> tuple[int, ...]:
    """Positions in the file from which on packets belong to another clip.

    The video's time stamps jump there, and so does the sound's.  Of the streams, the one that jumps first shows where.
    A jump ahead that the sound does not share is a frame that is shown long.
    """
    if kind(container) not in _JOINABLE:
        return ()
    sound = {stream.index: _Track() for stream in container.streams.audio}
    shown = _Track()
    tracks = {**sound, video.index: shown}
    for packet in packets(container, *container.streams):
        if packet.stream.index in tracks and packet.size:
            tracks[packet.stream.index].see(packet)
    found = []
    for before, after, back in shown.jumps:
        with_it = [
            [jump for jump in track.jumps if max(before, jump[0]) < min(after, jump[1])]
            for track in sound.values() if track.last is not None
        ]  # fmt: skip
        if back or all(with_it):
            found.append(min([after, *(jump[1] for jumps in with_it for jump in jumps)]))
    return tuple(sorted(set(found)))


def lay_out(container: InputContainer, video: VideoStream, joins: tuple[int, ...]) -> Timeline:
    """The timeline of a file with ``joins``: each clip starts where the longest stream of the one before ends."""
    start = Fraction(container.start_time or 0, av.time_base)
    if not joins:
        return Timeline(start)
    lasting = {video.index, *(stream.index for stream in container.streams.audio)}
    spans: dict[int, tuple[Fraction, Fraction]] = {}
    clips = Clips(joins)
    for packet in packets(container, *container.streams):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if packet.stream.index not in lasting or not packet.size or stamp is None:
            continue
        clip, first = clips.of(packet), stamp * packet.time_base
        last = first + (packet.duration or 0) * packet.time_base
        begin, end = spans.get(clip, (first, last))
        spans[clip] = min(begin, first), max(end, last)
    offsets = [Fraction(0)]
    begin, end = spans.get(0, (start, start))
    for clip in range(1, len(joins) + 1):
        reached = end + offsets[-1]
        begin, end = spans.get(clip, (end, end))
        offsets.append(reached - begin)
    return Timeline(spans[0][0] if 0 in spans else start, joins, tuple(offsets))


def frame_times(
    stamps: list[list[int | None]], decoding: list[int], container: InputContainer, video: VideoStream, timeline: Timeline
) -> list[int]:
    """Time stamps of the frames in the result, in the units of their stream, from 0 on, each later than the one before.

    Args:
        stamps: what the file says of the frames, in the order in which they are shown, by clip.
        decoding: decoding time stamps of the video's packets.
    """
    unit = cast(Fraction, video.time_base)
    step = frame_step(video)
    times: list[int] = []
    for clip, found in enumerate(stamps):
        for time in _filled(_in_order(found, decoding if kind(container) == "avi" else []), step):
            times.append(max(times[-1] + 1 if times else 0, time + timeline.added(clip, unit)))
    return times


def last_duration(own: int, start: int, container: InputContainer, video: VideoStream, timeline: Timeline) -> int:
    """How long the last frame is shown, in the units of its stream.

    Args:
        own: what the file says of it.  MP4 stores durations in the order of decoding: with B-frames they are those of others.
        start: when it is shown, in the result.
    """
    if kind(container) == "mov" and video.duration:
        end = (video.start_time or 0) + video.duration + timeline.added(0, cast(Fraction, video.time_base))
        own = min(own, end - start)
    return own if own > 0 else frame_step(video)


def frame_step(video: VideoStream) -> int:
    """The distance of frames by the rate that the file names, in the units of their stream."""
    rate = video.guessed_rate or video.average_rate or Fraction(25)
    return max(1, round(1 / (rate * cast(Fraction, video.time_base))))


def _in_order(found: list[int | None], decoding: list[int]) -> list[int | None]:
    """Time stamps that do not go back: the same ones, the lowest first.

    AVI has a place in time for each packet and none for each frame.  FFmpeg guesses which belong together, and wrongly for
    H.264 with B-frames; since each packet is a frame, the first of both belong together.
    """
    known = [time for time in found if time is not None]
    if all(one < other for one, other in pairwise(known)):
        return found
    if len(decoding) == len(found):
        return [*sorted(decoding)]
    ordered = iter(sorted(known))
    return [None if time is None else next(ordered) for time in found]


def _filled(found: list[int | None], step: int) -> list[int]:
    """Frames without a time, or with that of another frame, spread evenly between their neighbours."""
    known = []
    for index, time in enumerate(found):
        if time is not None and (not known or time > known[-1][1]):
            known.append((index, time))
    if not known:
        return [index * step for index in range(len(found))]
    (first, start), (last, end) = known[0], known[-1]
    times = [start - (first - index) * step for index in range(first)]
    for (one, begin), (other, until) in pairwise(known):
        times += [begin + (until - begin) * (index - one) // (other - one) for index in range(one, other)]
    return times + [end + (index - last) * step for index in range(last, len(found))]
