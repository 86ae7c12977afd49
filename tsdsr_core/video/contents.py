"""What a video holds besides its frames, in the result: sound, subtitles, covers, attachments, chapters and texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from io import BytesIO
from typing import Any, cast

import av
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from .reading import Clip
from .sound import Recoder, SoundPlan
from .timing import Clips, Timeline

_OF_THE_FILE = {"major_brand", "minor_version", "compatible_brands", "encoder", "software", "wmfsdkversion", "wmfsdkneeded"}
"""Metadata that describe the old file, not its content."""
_OF_THE_STREAM = ("language", "title", "handler_name")
_CAMERA = ("make", "model", "location", "com.apple.quicktime.", "com.android.")
"""How the names begin under which telephones and cameras note their maker and the place."""
_ALL_TEXTS = {"movflags": "use_metadata_tags"}
"""Lets MP4 and MOV hold metadata of any name, as telephones do, but no cover."""
_PICTURES = {"mjpeg": ("jpg", "image/jpeg"), "png": ("png", "image/png"), "bmp": ("bmp", "image/bmp")}
"""Suffix and type of cover files, by FFmpeg's name."""


@dataclass
class Contents:
    """Where the packets of a source go."""

    copied: dict[int, Stream] = field(default_factory=dict)
    coders: dict[int, Recoder] = field(default_factory=dict)
    """By index in the source."""
    lost: list[str] = field(default_factory=list)

    def streams(self, source: InputContainer) -> list[Stream]:
        """Those of the source that are wanted."""
        return [stream for stream in source.streams if stream.index in self.copied or stream.index in self.coders]


class Shift:
    """Brings the packets of a source onto the time of the result."""

    def __init__(self, timeline: Timeline, strict: bool) -> None:
        """``strict``: whether the container wants each time stamp to be later than the one before, not only as late."""
        self._timeline = timeline
        self._clips = Clips(timeline.joins)
        self._step = int(strict)
        self._next: dict[int, int] = {}
        """The lowest time stamp for the next packet, by stream of the result."""
        self._before: dict[int, int] = {}
        """The time stamp of the last packet."""

    def moved(self, packet: Any) -> Any:
        """``packet``, its time stamps counted from the result's start."""
        return self._counted(packet, packet.time_base)

    def copied(self, packet: Any, stream: Stream) -> Any:
        """``packet`` for ``stream``, moved, and not before the one that was written last."""
        self._counted(packet, cast(Fraction, stream.time_base))
        if packet.dts is not None:
            time = max(packet.dts, self._next.get(stream.index, packet.dts))
            packet.dts, packet.pts = time, None if packet.pts is None else max(packet.pts, time)
            if stream.type == "audio" and not packet.duration:  # of the last one MP4 wants it, or it is not played
                packet.duration = time - self._before.get(stream.index, time)
            self._next[stream.index], self._before[stream.index] = time + self._step, time
        packet.stream = stream
        return packet

    def _counted(self, packet: Any, unit: Fraction) -> Any:
        """Moved and counted in ``unit``."""
        added = self._timeline.added(self._clips.of(packet), packet.time_base)
        factor = packet.time_base / unit
        pts, dts = packet.pts, packet.dts if packet.dts is not None else packet.pts
        packet.pts = None if pts is None else round((pts + added) * factor)
        packet.dts = None if dts is None else round((dts + added) * factor)
        packet.duration, packet.time_base = round((packet.duration or 0) * factor), unit
        return packet


def texts_for(clip: Clip, container: str) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """The metadata of a result, the options with which ``container`` is written for them, and the names of what it cannot hold.

    The container is tried: FFmpeg writes those metadata that it has a place for, and leaves the others out in silence.
    """
    texts = {name: text for name, text in clip.texts.items() if name.lower() not in _OF_THE_FILE}
    lost = _lost_texts(texts, container, {})
    ours = any(name.lower().startswith(_CAMERA) for name in lost)
    if ours and (container == "mov" or (container == "mp4" and not clip.covers)):
        return texts, dict(_ALL_TEXTS), _lost_texts(texts, container, _ALL_TEXTS)
    return texts, {}, lost


def _lost_texts(texts: Mapping[str, str], container: str, options: Mapping[str, str]) -> list[str]:
    """Names of ``texts`` that are not read again from a file."""
    buffer = BytesIO()
    with av.open(buffer, "w", format=container, container_options=dict(options), metadata_errors="replace") as sink:
        video: Any = sink.add_stream("mpeg4", rate=1)
        video.width = video.height = 16
        sink.metadata.update(texts)
        frame = av.VideoFrame(16, 16, "yuv420p")
        frame.pts, frame.time_base = 0, Fraction(1)
        sink.mux([*video.encode(frame), *video.encode(None)])
    buffer.seek(0)
    with av.open(buffer, metadata_errors="replace") as found:
        kept = {name.lower() for name in found.metadata}  # Matroska's are upper case
    return [name for name in texts if name.lower() not in kept]


def add_contents(
    sink: OutputContainer, source: InputContainer, video: VideoStream, clip: Clip, sound: SoundPlan | None
) -> Contents:
    """Make the streams of ``sink`` for what is kept besides the frames; without ``sound`` there is none."""
    contents = Contents()
    covers = dict(clip.covers)
    for stream in source.streams:
        if stream.index == video.index:
            continue
        if stream.type == "audio":
            if sound is not None:
                _add_sound(contents, sink, stream, sound)
        elif stream.index in covers and sink.format.name == "matroska":
            _attach(sink, stream, covers[stream.index])
        elif (new := _copy_of(stream, sink)) is not None:
            contents.copied[stream.index] = new
        else:
            name = getattr(stream.codec_context, "name", None) or getattr(stream, "name", None) or "unknown"
            contents.lost.append(f"{stream.type} ({name})" if not _is_cover(stream) else f"cover ({name})")
    if sound is not None:
        contents.lost += [f"audio ({name})" for name in sound.lost]
    sink.set_chapters(source.chapters())
    return contents


def describe(new: Stream, old: Stream) -> None:
    """Give a stream that is encoded anew the language and name of the old one."""
    new.metadata.update({key: old.metadata[key] for key in _OF_THE_STREAM if key in old.metadata})


def _is_cover(stream: Stream) -> bool:
    return bool(stream.type == "video" and stream.disposition & Disposition.attached_pic)


def _add_sound(contents: Contents, sink: OutputContainer, stream: Any, sound: SoundPlan) -> None:
    if stream.index in sound.coders:
        coder = Recoder(sink, stream, sound.coders[stream.index])
        describe(coder.stream, stream)
        coder.stream.disposition = stream.disposition
        contents.coders[stream.index] = coder
    elif stream.index in sound.copied:
        contents.copied[stream.index] = _template(stream, sink)


def _attach(sink: OutputContainer, stream: Stream, data: bytes) -> None:
    """Write a cover as Matroska wants it: as an attachment; as a stream it would be a second video."""
    suffix, mime = _PICTURES.get(str(stream.name), (str(stream.name), f"image/{stream.name}"))
    number = sum(each.type == "attachment" for each in sink.streams)
    name = stream.metadata.get("filename") or f"cover{number or ''}.{suffix}"
    attachment = sink.add_attachment(name, stream.metadata.get("mimetype") or mime, data)
    if "title" in stream.metadata:
        attachment.metadata["title"] = stream.metadata["title"]


def _copy_of(stream: Stream, sink: OutputContainer) -> Stream | None:
    """A stream that takes the packets of ``stream`` as they are, where the container can hold them."""
    mkv = sink.format.name == "matroska"
    cover = _is_cover(stream) and sink.format.name == "mp4" and "movflags" not in sink.container_options
    if not (cover or stream.type == "subtitle" or (stream.type == "attachment" and mkv)):
        return None
    try:
        return _template(stream, sink)
    except ValueError:
        return None


def _template(stream: Stream, sink: OutputContainer) -> Stream:
    new = sink.add_stream_from_template(stream, opaque=True)
    new.disposition = stream.disposition
    new.metadata.update(stream.metadata)
    return new


def written(contents: Contents, shift: Shift, packet: Packet[Any]) -> list[Packet[Any]]:
    """The packets of the result that one of the source gives."""
    index = packet.stream.index
    if index in contents.coders:
        return contents.coders[index].decoded(shift.moved(packet) if packet.size else packet)
    if not packet.size:  # it only marks the end
        return []
    return [shift.copied(packet, contents.copied[index])]
