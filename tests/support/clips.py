"""Small videos with sound for the tests, and what is in a video as FFmpeg reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

RATE = 25
LOSSLESS = {"codec": "ffv1", "pixels": "bgr0"}


def scene(index: int, height: int, width: int) -> np.ndarray:
    """A smooth picture ``(height, width, 3)`` in 8 bits that moves with ``index``."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.sin((x + 3 * index) / 7 + y / 11), np.cos((x - 2 * index) / 13), np.sin((y + index) / 9)
    return (np.stack(waves, -1) * 100 + 128).astype(np.uint8)


def make_clip(
    path: Path, frames: int = 6, height: int = 48, width: int = 64, codec: str = "libx264", pixels: str = "yuv420p",
    sound: str | None = "aac", times: list[int] | None = None, unit: Fraction = Fraction(1, RATE), options: dict | None = None,
    array: np.ndarray | None = None, **properties: Any,
) -> Path:  # fmt: skip
    """Write a video.

    Args:
        times: of the frames, in ``unit``.
        array: what all frames hold, in the format ``pixels``; None for ``scene``.
        properties: ``rate`` of the sound in samples per second, ``channels`` as FFmpeg names their layout, what is set on the
            codec context, such as ``color_range``, or ``rotation`` as (degrees, mirrored), ``container`` as
            options of the container, ``marks`` as metadata of the stream and ``texts`` as those of the file.
    """
    times = times or list(range(frames))
    rotation, container_options = properties.pop("rotation", None), properties.pop("container", None)
    rate, channels = properties.pop("rate", 48000), properties.pop("channels", "mono")
    marks, texts = properties.pop("marks", {}), properties.pop("texts", {})
    with av.open(f"file:{path}", "w", options=container_options) as sink:
        video = sink.add_stream(codec, rate=RATE, options=options or {})
        video.width, video.height, video.pix_fmt = width, height, pixels
        video.codec_context.time_base = unit
        for name, value in properties.items():
            setattr(video.codec_context, name, value)
        if rotation:
            video.set_display_rotation(rotation[0], hflip=rotation[1])
        video.metadata.update(marks)
        sink.metadata.update(texts)
        audio = sink.add_stream(sound, rate=rate, options={"strict": "-2"}) if sound else None
        if audio:
            audio.layout, audio.bit_rate = channels, 64000 if "wma" in audio.name or rate > 8000 else 12200
        for index, time in enumerate(times):
            if array is None:
                frame = av.VideoFrame.from_ndarray(scene(index, height, width), format="rgb24")
            else:
                frame = av.VideoFrame.from_ndarray(array, format=pixels)
            frame.pts, frame.time_base = time, unit
            sink.mux(video.encode(frame))
        sink.mux(video.encode(None))
        if audio:
            write_sound(sink, audio, times[0] * unit, len(times) * Fraction(1, RATE), rate, channels)
    return path


def write_sound(
    sink: Any, audio: Any, start: Fraction, seconds: Fraction, rate: int = 48000, channels: str = "mono"
) -> None:  # fmt: skip
    """A tone that rises."""
    resampler = av.AudioResampler(format=audio.format.name, layout=channels, rate=rate)
    for offset in range(0, int(seconds * rate), 1024):
        time = np.arange(offset, offset + 1024) / rate
        wave = np.sin(2 * np.pi * (300 + 400 * time) * time).astype(np.float32)[None] / 3
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, int(start * rate) + offset, Fraction(1, rate)
        for each in resampler.resample(frame):
            sink.mux(audio.encode(each))
    sink.mux(audio.encode(None))


def heard(path: Path, track: int = 0) -> np.ndarray:
    """What a decoder gives of a sound track: one channel, 48000 samples per second, from -1 to 1."""
    with av.open(f"file:{path}") as source:
        resampler = av.AudioResampler(format="flt", layout="mono", rate=48000)
        frames = [part for frame in source.decode(audio=track) for part in resampler.resample(frame)]
        return np.concatenate([frame.to_ndarray()[0] for frame in [*frames, *resampler.resample(None)]])


@dataclass
class Found:
    """What FFmpeg reads in a file."""

    frames: list[av.VideoFrame] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """Of the frames, in seconds from the file's start."""
    sound: list[bytes] = field(default_factory=list)
    """The packets."""
    sound_start: float = 0.0
    """Of the first packet, in seconds from the file's start."""
    video: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def look(path: Path) -> Found:
    """Read a file whole."""
    found = Found()
    with av.open(f"file:{path}") as source:
        start = (source.start_time or 0) / av.time_base
        stream = source.streams.video[0]
        context = stream.codec_context
        found.video = {"codec": context.name, "pixels": context.pix_fmt, "rate": stream.average_rate, "tag": context.codec_tag}
        found.video |= {"types": [each.type for each in source.streams], "aspect": stream.sample_aspect_ratio}
        found.video["chapters"] = [chapter["metadata"] for chapter in source.chapters()]
        found.metadata = dict(source.metadata)
        for packet in source.demux():
            if packet.stream.type == "audio" and packet.size:
                if not found.sound:
                    found.sound_start = float(packet.pts * packet.time_base) - start
                found.sound.append(bytes(packet))
            elif packet.stream.index == stream.index:
                for frame in packet.decode():
                    found.frames.append(frame)
                    found.times.append(float(frame.pts * frame.time_base) - start)
    return found


def stored(frame: av.VideoFrame, channel: int = 0) -> np.ndarray:
    """The numbers of a plane of a planar frame, ``(H, W)``."""
    plane = frame.planes[channel]
    kind = np.dtype("u1" if frame.format.components[0].bits == 8 else "<u2")
    return np.frombuffer(bytes(plane), kind).reshape(plane.height, -1)[:, : plane.width].astype(int)
