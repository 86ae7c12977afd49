"""Videos: frames, time stamps, sound, colours and rotation survive, checked by FFmpeg's own reading of the results."""

import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from av.stream import Disposition

from tsdsr_core.video import writing
from tsdsr_core.video.formats import result_name
from tsdsr_core.video.reading import Turn, read_clip, upright
from tsdsr_core.video.writing import even, write_clip

from ..support.clips import LOSSLESS, look, make_clip, scene, stored


def doubled(rgb: torch.Tensor) -> torch.Tensor:
    return F.interpolate(rgb, scale_factor=2, mode="nearest")


def same(rgb: torch.Tensor) -> torch.Tensor:
    return rgb


def rewrite(source: Path, target: Path, change=doubled, factor: int = 2) -> Path:
    clip = read_clip(source)
    write_clip(clip, target, (factor * clip.height, factor * clip.width), change, lambda: None)
    return target


@pytest.fixture
def lossless(monkeypatch):
    """Written frames are what was computed."""
    encoders = {8: ("libx264", {"crf": "0"}), 10: ("libx265", {"x265-params": "lossless=1:log-level=none"})}
    monkeypatch.setattr(writing, "_ENCODERS", encoders)


TIMINGS = {
    "constant.mp4": {},
    "b frames.avi": {"codec": "mpeg4", "sound": "mp2", "options": {"bf": "2"}},
    "variable.mkv": {"times": [0, 40, 90, 91, 500, 1700], "unit": Fraction(1, 1000), "sound": "libopus"},
    "late.ts": {"codec": "mpeg2video", "sound": "mp2", "times": list(range(2500, 2506))},
    "slow.mov": {"times": [0, 50, 100], "sound": "pcm_s16le"},
    "other.webm": {"codec": "libvpx-vp9", "sound": "libopus"},
    "silent.m4v": {"sound": None},
}


@pytest.mark.parametrize("name", TIMINGS)
def test_time_stamps_and_sound_are_kept(name, tmp_path):
    source = make_clip(tmp_path / name, **TIMINGS[name])
    before, after = look(source), look(rewrite(source, tmp_path / "out" / result_name(source)))
    assert len(after.times) == len(before.times) >= 3
    assert after.times == pytest.approx(before.times, abs=0.0011), "MKV counts milliseconds"
    assert after.sound == before.sound
    assert bool(after.sound) == (name != "silent.m4v")
    assert after.sound_start == pytest.approx(before.sound_start, abs=0.0011)
    if name != "slow.mov":  # where FFmpeg counts the frame that was written last, not the one shown last
        assert after.video["rate"] == before.video["rate"]
    assert after.frames[0].duration * after.frames[0].time_base == pytest.approx(
        float(before.frames[0].duration * before.frames[0].time_base), abs=0.0011
    )
    assert {(frame.height, frame.width) for frame in after.frames} == {(96, 128)}


RED = {
    ("yuv444p", 1, 1): (63, 102, 240), ("yuv444p", 6, 1): (81, 90, 240), ("yuv444p", 6, 2): (76, 85, 255),
    ("yuv444p10le", 1, 1): (250, 409, 960), ("yuv444p10le", 9, 1): (294, 387, 960), ("yuv444p", 2, 0): (81, 90, 240),
}  # fmt: skip
"""Red by (pixel format, matrix, range) of ITU-T H.273, as BT.601, BT.709 and BT.2020 have it; what is not named is as in SD."""


@pytest.mark.parametrize(("pixels", "matrix", "span"), RED)
def test_colours_are_read_and_written_by_matrix_and_range(pixels, matrix, span, lossless, tmp_path):
    y, cb, cr = RED[pixels, matrix, span]
    kind = np.uint16 if "10" in pixels else np.uint8
    frames = [av.VideoFrame(64, 48, pixels)]
    for plane, value in zip(frames[0].planes, (y, cb, cr), strict=True):
        plane.update(np.full(plane.buffer_size // kind().itemsize, value, kind).tobytes())
    source = tmp_path / "red.mkv"
    with av.open(source, "w") as sink:
        video = sink.add_stream("ffv1", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, pixels
        video.codec_context.colorspace, video.codec_context.color_range = matrix, span
        frames[0].pts = 0
        sink.mux([*video.encode(frames[0]), *video.encode(None)])
    seen = []

    def keep(rgb: torch.Tensor) -> torch.Tensor:
        seen.append(rgb)
        return rgb

    (frame,) = look(rewrite(source, tmp_path / "out.mp4", keep, 1)).frames
    step = 1 / (1023 if "10" in pixels else 255)
    assert (seen[0] - torch.tensor([1.0, 0, 0])[:, None, None]).abs().max() < 1.2 * step
    written = frame.reformat(format="yuv420p10le" if "10" in pixels else "yuv420p")
    found = [np.frombuffer(bytes(plane), kind)[: plane.width] for plane in written.planes]
    assert [np.abs(plane.astype(int) - value).max() <= 1 for plane, value in zip(found, (y, cb, cr), strict=True)] == [True] * 3
    assert (frame.colorspace, frame.color_range) == (matrix if matrix != 2 else 6, span or 1)


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuv420p10le", "gray", "gray10le"])
def test_an_unchanged_frame_keeps_its_values(pixels, lossless, tmp_path):
    """The luma but for rounding; the chroma but for its halved sides."""
    codec = "mjpeg" if pixels == "yuvj420p" else "ffv1"
    source = make_clip(tmp_path / "in.mkv", frames=2, codec=codec, pixels=pixels, sound=None)
    before, after = look(source), look(rewrite(source, tmp_path / "out.mkv", same, 1))
    assert after.video["pixels"].removesuffix("le").endswith("10") == ("10" in pixels)
    for old, new in zip(before.frames, after.frames, strict=True):
        found = [stored(frame, 0) for frame in (old, new)]
        assert np.abs(found[0] - found[1]).max() <= 1
        if "444" in pixels:  # FFmpeg halves by other filters
            continue
        small = [frame.reformat(format=after.video["pixels"]) for frame in (old, new)]
        for plane in (1, 2):
            found = [stored(frame, plane) for frame in small]
            assert np.abs(found[0] - found[1]).mean() < (2 if "10" in pixels else 0.6)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_rotated_videos_come_out_upright(degrees, mirrored, tmp_path):
    source = make_clip(tmp_path / "in.mp4", frames=2, rotation=(degrees, mirrored), height=32)
    with av.open(source) as container:
        frame = next(container.decode(video=0))
        assert not degrees or mirrored or frame.rotation % 360 == degrees
    picture = frame.to_ndarray(format="rgb24").astype(int)
    turned = np.rot90(picture, degrees // 90)
    if mirrored:  # after it is turned
        turned = turned[:, ::-1]
    clip = read_clip(source)
    found = (upright(frame, clip.turn)[0].permute(1, 2, 0).numpy() * 255).round()
    assert np.abs(found - turned).mean() < 6, "FFmpeg shifts the chroma by half a pixel"
    assert (clip.height, clip.width) == turned.shape[:2]
    result = look(rewrite(source, tmp_path / "out.mp4", same, 1)).frames[0]
    assert result.rotation == 0
    assert np.abs(result.to_ndarray(format="rgb24") - turned).mean() < 6


def test_pixels_that_are_not_square_stay_so(tmp_path):
    source = make_clip(tmp_path / "in.mp4", sound=None, sample_aspect_ratio=Fraction(16, 15))
    assert look(rewrite(source, tmp_path / "out.mp4")).video["aspect"] == Fraction(16, 15)
    source = make_clip(tmp_path / "up.mp4", sound=None, sample_aspect_ratio=Fraction(16, 15), rotation=(90, False))
    assert look(rewrite(source, tmp_path / "up-out.mp4")).video["aspect"] == Fraction(15, 16)


def test_odd_sizes_get_a_row_and_a_column_more(lossless, tmp_path):
    source = make_clip(tmp_path / "in.mkv", frames=2, height=47, width=63, **LOSSLESS)
    assert even((47, 63)) == (48, 64)
    found = look(rewrite(source, tmp_path / "out.mp4", same, 1)).frames[1]
    values = stored(found)
    assert values.shape == (48, 64)
    weights = np.array([0.2126, 0.7152, 0.0722])  # RGB becomes BT.709
    assert np.abs(values[:47, :63] - (scene(1, 47, 63) / 255 @ weights * 219 + 16)).max() <= 0.51
    assert (values[47] == values[46]).all()
    assert (values[:, 63] == values[:, 62]).all()


def test_ten_bits_stay_ten_bits(tmp_path):
    source = make_clip(tmp_path / "in.mp4", codec="libx265", pixels="yuv420p10le", options={"x265-params": "log-level=none"})
    found = look(rewrite(source, tmp_path / "out.mp4")).video
    assert (found["codec"], found["pixels"], found["tag"]) == ("hevc", "yuv420p10le", "hvc1")


def test_what_else_a_file_holds_is_copied_or_named(tmp_path, caplog):
    source, rich = make_clip(tmp_path / "plain.mkv"), tmp_path / "rich.mkv"
    (tmp_path / "words.srt").write_text("1\n00:00:00,040 --> 00:00:00,120\nHallo\n")
    with av.open(source) as old, av.open(tmp_path / "words.srt") as words, av.open(rich, "w") as new:
        subtitles = new.add_stream_from_template(words.streams.subtitles[0])
        subtitles.metadata["language"] = "ger"
        new.add_attachment("font.ttf", "font/ttf", b"glyphs")
        new.metadata["title"] = "Tür"
        whole = {"id": 1, "start": 0, "end": 200, "time_base": Fraction(1, 1000), "metadata": {"title": "One"}}
        new.set_chapters([whole])
        streams = {each.index: new.add_stream_from_template(each) for each in old.streams}
        for packet in (*words.demux(), *old.demux()):
            if packet.size:
                packet.stream = subtitles if packet.stream.type == "subtitle" else streams[packet.stream.index]
                new.mux(packet)
    result = rewrite(rich, tmp_path / "out.mkv")
    found = look(result)
    assert (found.metadata["title"], found.video["chapters"]) == ("Tür", [{"title": "One"}])
    assert found.video["types"] == ["video", "subtitle", "audio", "attachment"]
    with av.open(result) as container:
        text, _ = container.demux(subtitles=0)
        assert (bytes(text), text.pts * text.time_base) == (b"Hallo", Fraction(1, 25))
        assert container.streams.subtitles[0].language == "ger"
    assert not caplog.messages
    found = look(rewrite(rich, tmp_path / "out.mp4"))
    assert found.video["types"][:2] == ["video", "audio"]
    assert found.metadata["title"] == "Tür"
    (message,) = caplog.messages
    assert message.endswith("out.mp4: left out subtitle (srt), attachment (font.ttf)")


def test_cover_art_is_neither_restored_nor_lost(tmp_path):
    clip, source = make_clip(tmp_path / "plain.mp4"), tmp_path / "in.mp4"
    with av.open(tmp_path / "cover.mjpeg", "w", format="mjpeg") as art:
        video = art.add_stream("mjpeg", rate=25)
        video.width, video.height, video.pix_fmt = 32, 32, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(scene(9, 32, 32), format="rgb24")
        art.mux([*video.encode(frame), *video.encode(None)])
    with av.open(tmp_path / "cover.mjpeg") as art, av.open(clip) as old, av.open(source, "w") as new:
        cover = new.add_stream_from_template(art.streams.video[0], opaque=True)
        cover.disposition = Disposition.attached_pic
        streams = {each.index: new.add_stream_from_template(each, opaque=True) for each in old.streams}
        for packet in (*art.demux(), *old.demux()):
            if packet.size:
                packet.stream = cover if packet.stream.container is art else streams[packet.stream.index]
                new.mux(packet)
    with av.open(rewrite(source, tmp_path / "out.mp4")) as found:
        covers = [stream for stream in found.streams.video if stream.disposition & Disposition.attached_pic]
        assert [(stream.width, stream.height) for stream in covers] == [(32, 32)]
        assert found.streams.best("video").width == 128
        assert sum(packet.size > 0 for packet in found.demux(found.streams.best("video"))) == 6


def test_what_the_numbers_mean_is_kept(tmp_path):
    """Primaries and transfer function, here those of HDR."""
    hdr = {"colorspace": 9, "color_range": 1, "color_primaries": 9, "color_trc": 16}
    options = {"x265-params": "log-level=none"}
    source = make_clip(tmp_path / "in.mp4", codec="libx265", pixels="yuv420p10le", options=options, frames=3, **hdr)
    frame = look(rewrite(source, tmp_path / "out.mp4")).frames[2]
    assert {name: getattr(frame, name) for name in hdr} == hdr


def test_one_frame_at_a_time_is_in_memory(tmp_path):
    alive, most = weakref.WeakSet(), []

    def change(rgb: torch.Tensor) -> torch.Tensor:
        result = doubled(rgb)
        alive.update((rgb, result))
        most.append(len(alive))
        return result

    rewrite(make_clip(tmp_path / "in.mp4", frames=40), tmp_path / "out.mp4", change)
    assert len(most) == 40
    assert max(most) <= 2


def test_turns_are_quarter_turns():
    image = torch.arange(6).reshape(2, 3)
    assert torch.equal(Turn(True, False, True).applied(image), torch.rot90(image))
    assert torch.equal(Turn(False, True, True).applied(image), torch.rot90(image, 2))
    assert torch.equal(Turn(True, True, False).applied(image), torch.rot90(image, 3))


@pytest.mark.parametrize("kind", ["mov", "webm"])
def test_alpha_that_is_left_out_is_said(kind, tmp_path, caplog):
    codec, pixels = {"mov": ("qtrle", "argb"), "webm": ("libvpx-vp9", "yuva420p")}[kind]
    plain = make_clip(
        tmp_path / f"plain.{kind}", frames=2, codec=codec, pixels={"mov": "rgb24", "webm": "yuv420p"}[kind], sound=None
    )
    read_clip(plain)
    assert "alpha" not in caplog.text
    clip = make_clip(tmp_path / f"alpha.{kind}", frames=2, codec=codec, pixels=pixels, sound=None)
    read_clip(clip)
    assert f"{clip}: left out its alpha channel" in caplog.text
