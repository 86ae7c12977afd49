"""The sound of a video in its result: copied where the container holds it, else encoded again, and never lost unsaid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import av
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.error import InvalidDataError
from av.filter import Graph
from av.packet import Packet

from ..errors import InputError
from .formats import WRITTEN
from .reading import opened
from .timing import kind, packets

_ENOUGH = 64
"""Packets at the start of a track by which it shows what a container holds."""
_LOSSLESS, _LOSSY = ("flac", "alac", "aac"), ("aac",)
"""Encoders to try: for sound that decodes to whole numbers, which FLAC and ALAC keep exactly, and for other sound."""
_RATE = 128_000
"""Bits per second and channel of AAC, and the bits that it may use at most per sample."""
_MOST = 6
_UNSAFE = {"tta"}
"""MKV does not store TTA's length; FFmpeg takes that of the whole file, and then drops the end of a shorter sound."""
_SHOWN = {"flac": "FLAC", "alac": "ALAC", "aac": "AAC"}


_Track = tuple[AudioStream, list[Any]]
"""A sound track, and its first packets."""


@dataclass(frozen=True)
class Coder:
    """How a track is encoded again."""

    encoder: str
    layout: str
    """FFmpeg's name of the channels."""


@dataclass
class SoundPlan:
    """What becomes of each sound track, by its index in the file."""

    copied: set[int] = field(default_factory=set)
    coders: dict[int, Coder] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    """The formats of tracks that cannot be kept."""
    warnings: list[str] = field(default_factory=list)


def plan_sound(path: Path, target: Path) -> SoundPlan:
    """Try what the container of ``target`` holds of the sound of the video ``path``.

    Raises:
        InputError: where it has sound and none of it can be kept.
    """
    plan, container = SoundPlan(), WRITTEN[target.suffix.lower()]
    again: dict[str, str] = {}
    with opened(path) as (source, _):
        tracks = _first_packets(source)
        for stream, found in tracks:
            name = _name(stream)
            if not found:
                plan.lost.append(f"{name}, empty")
            elif _holds(container, stream, found):
                plan.copied.add(stream.index)
            elif (coder := _coder(container, stream, found)) is not None:
                plan.coders[stream.index] = coder
                again[name] = _SHOWN[coder.encoder]
            else:
                plan.lost.append(name)
        _say(plan, again, target, [(stream, found) for stream, found in tracks if found])
    return plan


def _say(plan: SoundPlan, again: Mapping[str, str], target: Path, tracks: list[_Track]) -> None:
    """Warn of tracks that are encoded ``again``; refuse where none of ``tracks`` is kept."""
    kept = bool(plan.copied or again)
    if not tracks or (kept and not again):
        return
    others = [
        suffix for suffix, container in WRITTEN.items()
        if container != WRITTEN[target.suffix.lower()] and all(_holds(container, *track) for track in tracks)
    ]  # fmt: skip
    advice = f"write {' or '.join(others)}" if others else ""
    said = f"{target.suffix} cannot hold the sound of the input"
    if kept:
        formats = ", ".join(dict.fromkeys(again.values()))
        said += f" ({', '.join(again)}): encoded again as {formats}{f'; {advice} to keep it as it is' if advice else ''}"
        plan.warnings.append(said)
    else:
        raise InputError(
            f"{target}: {said} ({', '.join(plan.lost)}), and it cannot be encoded again: {advice + ', or ' if advice else ''}"
            "add --no-sound to leave it out"
        )


class Recoder:
    """Encodes a track again: without gaps or overlaps, which encoders do not take, at the times that its packets have."""

    def __init__(self, sink: OutputContainer, source: AudioStream, coder: Coder) -> None:
        codec = av.Codec(coder.encoder, "w")
        rates = sorted(codec.audio_rates or [source.sample_rate])
        self._rate = source.sample_rate
        if self._rate not in rates:
            self._rate = next((rate for rate in rates if rate >= self._rate), rates[-1])
        formats = [each.name for each in codec.audio_formats or []]
        deep = source.format.name.startswith(("s32", "s64")) and any(name.startswith("s32") for name in formats)
        self._format = next((name for name in formats if name.startswith("s32") == deep), formats[0])
        self.stream = cast(AudioStream, sink.add_stream(coder.encoder, rate=self._rate))
        context: Any = self.stream.codec_context
        context.format, context.layout = self._format, coder.layout
        context.time_base = self.stream.time_base = Fraction(1, self._rate)
        if coder.encoder in _LOSSY:
            context.bit_rate = cast(Any, self.stream).channels * min(_RATE, _MOST * self._rate)
        context.open()
        self._layout = coder.layout
        # AVI has no times of its sound, only how much there is, and FFmpeg's are wrong for some formats
        self._fills = int(kind(cast(Any, source.container)) != "avi")
        self._graph: Graph | None = None
        self._shape: tuple[Any, ...] = ()
        self._next: int | None = None
        self.damaged = 0

    def decoded(self, packet: Packet[Any]) -> list[Packet[Any]]:
        """The new packets that a packet of the old track gives; its time stamps are those of the result."""
        try:
            frames = cast(list[AudioFrame], packet.decode())
        except InvalidDataError:  # a click in a film is no reason to end; what is missing becomes silence
            self.damaged += 1
            return []
        return self.encoded(frames)

    def encoded(self, frames: Iterable[AudioFrame]) -> list[Packet[Any]]:
        """The new packets that frames give."""
        found = []
        for frame in frames:
            shape = frame.format.name, frame.layout.name, frame.sample_rate
            if self._graph is None or shape != self._shape:
                found += self._drained()
                self._graph, self._shape = self._built(frame), shape
            if self._next is None:
                self._next = round((frame.pts or 0) * cast(Fraction, frame.time_base) * self._rate)
            self._graph.push(frame)
            found += self._pulled()
        return found

    def finished(self) -> list[Packet[Any]]:
        """The last packets."""
        return self._drained() + self.stream.encode(None)

    def _built(self, frame: AudioFrame) -> Graph:
        graph = Graph()
        shape = {"format": frame.format.name, "layout": frame.layout.name, "sample_rate": frame.sample_rate}
        size = self.stream.codec_context.frame_size or 1024
        wanted = f"sample_fmts={self._format}:sample_rates={self._rate}:channel_layouts={self._layout}"
        graph.link_nodes(
            graph.add_abuffer(time_base=frame.time_base, **shape),
            graph.add("aresample", f"async={self._fills}"), graph.add("aformat", wanted),
            graph.add("asetnsamples", f"n={size}:p=0"), graph.add("abuffersink"),
        ).configure()  # fmt: skip
        return graph

    def _drained(self) -> list[Packet[Any]]:
        if self._graph is None:
            return []
        self._graph.push(None)
        return self._pulled()

    def _pulled(self) -> list[Packet[Any]]:
        found: list[Packet[Any]] = []
        while True:
            try:
                frame = cast(Any, self._graph).pull()
            except (BlockingIOError, EOFError):
                return found
            frame.pts, frame.time_base = self._next, Fraction(1, self._rate)
            self._next = cast(int, self._next) + frame.samples
            found += self.stream.encode(frame)


def _name(stream: Any) -> str:
    return getattr(stream.codec_context, "name", None) or "unknown"  # without a decoder PyAV's stream has no name


def _first_packets(source: Any) -> list[_Track]:
    found: dict[int, list[Packet[Any]]] = {stream.index: [] for stream in source.streams.audio}
    tracks = [(stream, found[stream.index]) for stream in source.streams.audio]
    missing = set(found)
    if missing:
        for packet in packets(source, *source.streams.audio):
            if packet.size and packet.stream.index in missing:
                found[packet.stream.index].append(packet)
                if len(found[packet.stream.index]) == _ENOUGH:
                    missing.remove(packet.stream.index)
            if not missing:
                break
    return tracks


def _holds(container: str, stream: AudioStream, found: list[Packet[Any]]) -> bool:
    """Whether packets of a track can be written and read again as what they were."""
    if stream.codec_context is None or stream.codec_context.name in _UNSAFE:
        return False
    buffer = BytesIO()
    try:
        with av.open(buffer, "w", format=container) as sink:
            new = sink.add_stream_from_template(stream, opaque=True)
            time = 0  # not the file's, which may go back
            for packet in found:
                copy: Any = av.Packet(bytes(packet))
                copy.pts = copy.dts = time
                copy.duration, copy.time_base, copy.stream = packet.duration, packet.time_base, new
                time += max(1, packet.duration or 0)
                sink.mux(copy)
        return _is_read(buffer, stream.sample_rate, stream.channels)
    except (av.FFmpegError, ValueError):
        return False


def _coder(container: str, stream: AudioStream, found: list[Packet[Any]]) -> Coder | None:
    """How a track can be encoded for ``container``, tried with its first packets."""
    if stream.codec_context is None:
        return None
    frames = []
    for packet in found:
        try:
            frames += packet.decode()
        except InvalidDataError:
            continue
    if not frames:
        return None
    whole = frames[0].format.name.startswith(("s", "u"))
    layouts = dict.fromkeys([frames[0].layout.name, f"{frames[0].layout.nb_channels}c", "stereo"])
    for encoder in _LOSSLESS if whole else _LOSSY:
        for layout in layouts:
            coder = Coder(encoder, layout)
            if _encodes(container, stream, coder, frames):
                return coder
    return None


def _encodes(container: str, stream: AudioStream, coder: Coder, frames: list[AudioFrame]) -> bool:
    buffer = BytesIO()
    try:
        with av.open(buffer, "w", format=container) as sink:
            new = Recoder(sink, stream, coder)
            sink.mux([*new.encoded(frames), *new.finished()])
            rate, channels = new.stream.sample_rate, new.stream.channels
        return _is_read(buffer, rate, channels)
    except (av.FFmpegError, ValueError):
        return False


def _is_read(buffer: BytesIO, rate: int, channels: int) -> bool:
    buffer.seek(0)
    with av.open(buffer, "r") as found:
        for stream in found.streams.audio:
            if stream.codec_context is None or (stream.sample_rate, stream.channels) != (rate, channels):
                return False
            return any(frame.samples for frame in found.decode(stream))
    return False
