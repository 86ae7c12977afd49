"""Sound of every kind is in every result: copied, or encoded again with a warning, or the file is refused."""

import itertools
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tsdsr_core.errors import InputError
from tsdsr_core.video.reading import read_clip
from tsdsr_core.video.writing import write_clip

from ..support.clips import heard, look, make_clip

PCM: dict[str, Any] = {"codec": "mpeg4", "sound": "pcm_s16le"}
SOURCES: dict[str, dict[str, Any]] = {
    "aac.mp4": {"sound": "aac"}, "opus.webm": {"codec": "libvpx-vp9", "sound": "libopus"}, "flac.mkv": {"sound": "flac"},
    "alac.mov": {"sound": "alac"}, "ac3.vob": {"codec": "mpeg2video", "sound": "ac3"},
    "mp2.ts": {"codec": "mpeg2video", "sound": "mp2"}, "wavpack.mkv": {"sound": "wavpack"},
    "wma.wmv": {"codec": "wmv2", "sound": "wmav2", "rate": 44100}, "old wma.wmv": {"codec": "wmv2", "sound": "wmav1"},
    "ms.avi": {**PCM, "sound": "adpcm_ms"}, "ima.avi": {**PCM, "sound": "adpcm_ima_wav"},
    "swf.flv": {"codec": "flv1", "sound": "adpcm_swf", "rate": 22050},
    "nelly.flv": {"codec": "flv1", "sound": "nellymoser", "rate": 22050},
    "mp3.flv": {"codec": "flv1", "sound": "libmp3lame", "rate": 11025},
    "mulaw.mov": {"sound": "pcm_mulaw"}, "alaw.avi": {**PCM, "sound": "pcm_alaw"}, "u8.avi": {**PCM, "sound": "pcm_u8"},
    "pcm.avi": {**PCM, "channels": "5.1"}, "deep.mov": {"sound": "pcm_s24le"}, "float.mkv": {"sound": "pcm_f32le"},
    "amr.3gp": {"codec": "mpeg4", "sound": "libopencore_amrnb", "rate": 8000},
    "dvd.vob": {"codec": "mpeg2video", "sound": "pcm_dvd", "channels": "stereo"},
    "disc.m2ts": {"sound": "pcm_bluray", "channels": "stereo", "container": {"mpegts_m2ts_mode": "1"}},
}  # fmt: skip
SUFFIXES = (".mp4", ".mov", ".mkv")
WHOLE = ("pcm_s", "pcm_u8", "pcm_mulaw", "pcm_alaw", "pcm_dvd", "pcm_bluray", "adpcm", "alac", "flac")
"""Sound that decodes to whole numbers, so that encoding it again need not change a sample."""


@pytest.fixture
def write(caplog):
    def run(source: Path, target: Path, **options) -> list[str]:
        """Write a video unchanged; returns the warnings."""
        caplog.clear()
        clip = read_clip(source)
        write_clip(clip, target, (clip.height, clip.width), lambda rgb: rgb, lambda: None, **options)
        return [message for message in caplog.messages if "sound" in message]

    return run


def likeness(before: np.ndarray, after: np.ndarray) -> float:
    """The correlation of two sounds, shifted by no more than 50 ms."""
    size = min(len(before), len(after)) - 4800
    middle = before[2400 : 2400 + size]
    found = [np.corrcoef(middle, after[2400 + shift : 2400 + shift + size])[0, 1] for shift in range(-2400, 2400, 8)]
    return max(found)


@pytest.mark.parametrize(("name", "suffix"), list(itertools.product(SOURCES, SUFFIXES)))
def test_sound_is_in_every_result(name, suffix, write, tmp_path):
    source, target = make_clip(tmp_path / name, frames=15, **SOURCES[name]), tmp_path / f"out{suffix}"
    warnings = write(source, target)
    before, after = heard(source), heard(target)
    assert abs(len(before) - len(after)) < 7200, "a frame of AAC of 8000 Hz"
    assert likeness(before, after) > 0.97
    copied = look(source).sound == look(target).sound
    assert copied != bool(warnings)
    with av.open(source) as old, av.open(target) as new:
        (one,), (other,) = old.streams.audio, new.streams.audio
        assert (one.sample_rate, one.channels) == (other.sample_rate, other.channels)
        kind, codec = one.codec_context.name, other.codec_context.name
    if warnings:
        (said,) = warnings
        assert f"out{suffix}: {suffix} cannot hold the sound of the input ({kind}): encoded again as {codec.upper()}" in said
        for other in re.findall(r"\.\w+(?= or| to keep)", said.partition("write ")[2]):
            assert write(source, tmp_path / f"advised{other}") == []
            assert look(tmp_path / f"advised{other}").sound == look(source).sound
    if kind.startswith(WHOLE):
        assert np.array_equal(before, after), "not a sample differs"


def test_the_tracks_keep_languages_and_their_order(write, tmp_path):
    """One copied, one encoded again; the second is the one that players choose."""
    parts = [make_clip(tmp_path / name, frames=15, sound=sound) for name, sound in (("a.mov", "pcm_mulaw"), ("b.mov", "aac"))]
    both = tmp_path / "both.mov"
    with av.open(parts[0]) as one, av.open(parts[1]) as other, av.open(both, "w") as sink:
        taken = [one.streams.video[0], one.streams.audio[0], other.streams.audio[0]]
        new = [sink.add_stream_from_template(stream, opaque=True) for stream in taken]
        for stream, language, chosen in ((new[1], "ger", 0), (new[2], "eng", 1)):
            stream.metadata["language"], stream.disposition = language, chosen
        packets = [(packet, new[0] if packet.stream.type == "video" else new[1]) for packet in one.demux() if packet.size]
        for packet, stream in [*packets, *((packet, new[2]) for packet in other.demux(taken[2]) if packet.size)]:
            packet.stream = stream
            sink.mux(packet)
    assert len(write(both, tmp_path / "out.mkv")) == 1
    with av.open(tmp_path / "out.mkv") as found:
        tracks = found.streams.audio
        assert [(track.codec_context.name, track.language) for track in tracks] == [("flac", "ger"), ("aac", "eng")]
        assert [track.disposition & 1 for track in tracks] == [0, 1]
    assert np.array_equal(heard(both), heard(tmp_path / "out.mkv"))
    assert likeness(heard(both, 1), heard(tmp_path / "out.mkv", 1)) > 0.99


def unknown(path: Path) -> Path:
    """A video with sound of a kind that FFmpeg has no decoder for."""
    make_clip(path, frames=5, sound="pcm_mulaw")
    assert path.read_bytes().count(b"ulaw") == 1
    path.write_bytes(path.read_bytes().replace(b"ulaw", b"apxx"))
    return path


def test_sound_that_cannot_be_kept_is_refused_unless_it_is_not_wanted(write, tmp_path):
    source, target = unknown(tmp_path / "in.mov"), tmp_path / "out.mp4"
    done = []
    clip = read_clip(source)
    with pytest.raises(InputError, match=r"out\.mp4: \.mp4 cannot hold the sound .*add --no-sound to leave it out"):
        write_clip(clip, target, (48, 64), lambda rgb: rgb, lambda: done.append(1))
    assert not done, "before any frame"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mov"]
    assert write(source, target, sound=False) == []
    assert look(target).video["types"] == ["video"]
    assert len(look(target).frames) == 5
