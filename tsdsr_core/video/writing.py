"""Videos made of videos: each frame changed, the sound and what else the container holds copied."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch.nn.functional as F
from av.codec.codec import UnknownCodecError
from av.container import OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from torch import Tensor

from ..errors import InputError
from ..system.atomic import write_files
from .colours import Coding, to_frame
from .contents import Contents, Shift, add_contents, describe, texts_for, written
from .formats import WRITTEN
from .reading import Clip, Decoder, opened, upright
from .sound import SoundPlan, plan_sound
from .timing import packets
from .views import marks_for

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


def even(size: tuple[int, int]) -> tuple[int, int]:
    """``size`` with both sides even, as YUV 4:2:0 wants them: odd ones get a row or column more."""
    return size[0] + size[0] % 2, size[1] + size[1] % 2


def write_clip(
    clip: Clip, target: Path, size: tuple[int, int], change: Change, progress: Callable[[], Any], sound: bool = True
) -> None:
    """Write ``clip`` with each frame changed, all or nothing, one frame at a time; time stamps stay as they are.

    Args:
        size: (height, width) of what ``change`` gives.
        progress: called after each frame.
        sound: whether the result has sound.

    Raises:
        InputError: for a suffix, size or sound that cannot be written, before the first frame, or damage in ``clip``.
        OSError: where ``target`` cannot be written, with the reason.
    """
    container = WRITTEN.get(target.suffix.lower())
    if container is None:
        raise InputError(f"{target}: unknown format; expected one of {', '.join(WRITTEN)}")
    heard = plan_sound(clip.path, target) if sound else None
    write_files({target: lambda temporary: _write(clip, temporary, (target, container), size, change, progress, heard)})


def _write(
    clip: Clip, temporary: Path, named: tuple[Path, str], size: tuple[int, int], change: Change, progress: Callable[[], Any],
    heard: SoundPlan | None,
) -> None:  # fmt: skip
    target, container = named
    texts, options, lost_texts = texts_for(clip, container)
    with opened(clip.path) as (source, video), _sink(temporary, target, container, options) as sink:
        height, width = even(size)
        with _writing(target, f"{_ENCODERS[clip.coding.bits][0]} video of {width}x{height} pixels"):
            encoder = _add_video(sink, video, clip, target, (height, width))
            contents = add_contents(sink, source, video, clip, heard)
            sink.metadata.update(texts)
            sink.start_encoding()
        _warn(target, contents, heard, lost_texts)
        shift, decoder, number = Shift(clip.timeline, container != "matroska"), Decoder(video, clip.timeline), 0
        durations: dict[int, int] = {}  # of the frames in the encoder, by time stamp; it loses them
        for packet in packets(source, video, *contents.streams(source)):
            if packet.stream.index != video.index:
                with _writing(target):
                    sink.mux(written(contents, shift, packet))
                continue
            for _, frame in decoder.frames(packet):
                if number == clip.frames:
                    raise InputError(f"{clip.path} has changed while it was read")
                changed = _coded(change(upright(frame, clip.turn)), clip.coding)
                changed.pts, changed.time_base = clip.times[number], video.time_base
                durations[clip.times[number]] = clip.durations[number]
                with _writing(target):
                    sink.mux(_timed(encoder.encode(changed), durations))
                number += 1
                progress()
        with _writing(target):
            sink.mux(_timed(encoder.encode(None), durations))
            for coder in contents.coders.values():
                sink.mux(coder.finished())
            sink.close()
    damaged = sum(coder.damaged for coder in contents.coders.values())
    if damaged:
        log.warning("%s: %d packets of its sound are damaged: silence in their place", clip.path, damaged)


def _warn(target: Path, contents: Contents, heard: SoundPlan | None, texts: list[str]) -> None:
    for warning in heard.warnings if heard else ():
        log.warning("%s: %s", target, warning)
    lost = [*contents.lost, *([f"text ({', '.join(texts)})"] if texts else [])]
    if lost:
        log.warning("%s: left out %s", target, ", ".join(dict.fromkeys(lost)))


def _timed(encoded: list[Packet[Any]], durations: dict[int, int]) -> list[Packet[Any]]:
    """Packets of the encoder with the durations of their frames."""
    for packet in encoded:
        packet.duration = durations.pop(packet.pts, 0) if packet.pts is not None else 0
    return encoded


def _coded(rgb: Tensor, coding: Coding) -> av.VideoFrame:
    height, width = even((rgb.shape[2], rgb.shape[3]))
    return to_frame(F.pad(rgb, (0, width - rgb.shape[3], 0, height - rgb.shape[2]), mode="replicate"), coding)


@contextmanager
def _sink(temporary: Path, target: Path, container: str, options: dict[str, str]) -> Iterator[OutputContainer]:
    """A file to be written; the block closes it, or it is let go after an error."""
    with _writing(target):
        sink = av.open(f"file:{temporary}", "w", format=container, container_options=options, metadata_errors="replace")
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


def _add_video(sink: OutputContainer, video: VideoStream, clip: Clip, target: Path, size: tuple[int, int]) -> VideoStream:
    name, options = _ENCODERS[clip.coding.bits]
    marks = marks_for(clip.views, sink.format.name, name == "libx264", clip.turn.swaps, clip.aspect)
    if marks.packing:
        given = options.get("x264-params")
        options = {**options, "x264-params": ":".join(filter(None, (given, f"frame-packing={marks.packing}")))}
    for warning in marks.warnings:
        log.warning("%s: %s", target, warning)
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
    describe(encoder, video)
    encoder.metadata.update(marks.metadata)
    return encoder
