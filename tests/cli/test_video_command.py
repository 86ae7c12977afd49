"""``tsdsr upscale`` on videos: the frames are those of the image path; what cannot be is one error, and nothing stays."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tsdsr_core.cli import main
from tsdsr_core.cli import upscale as upscale_command
from tsdsr_core.cli.progress import bar, time_left
from tsdsr_core.families.load import load
from tsdsr_core.images.files import Picture, write_picture
from tsdsr_core.pipeline import Options, restore
from tsdsr_core.video import writing

from ..support.clips import LOSSLESS, look, make_clip, scene, stored
from ..support.tiny import photo

ROOT = Path(__file__).parents[2]
LUMA = torch.tensor([0.2126, 0.7152, 0.0722])


def upscale(*arguments) -> int:
    return main(["upscale", "--dtype", "fp32", *map(str, arguments)])


@pytest.fixture
def quick(monkeypatch):
    """Frames are enlarged, not restored, where only files and messages matter."""

    def enlarge(image, model, options, progress=None):
        return torch.nn.functional.interpolate(image, scale_factor=options.scale)

    monkeypatch.setattr(upscale_command, "restore", enlarge)


def test_frames_are_those_of_the_image_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(writing._ENCODERS, 8, ("libx264", {"crf": "0"}))
    source = make_clip(tmp_path / "clip.mkv", frames=2, height=40, width=56, sound="flac", **LOSSLESS)
    assert upscale(source, "-o", tmp_path / "new" / "clip-2x.mp4", "--scale", "2") == 0
    assert "clip-2x.mp4  112x80  " in capsys.readouterr().out
    found = look(tmp_path / "new" / "clip-2x.mp4")
    assert found.sound == look(source).sound
    model = load("builtin", device=torch.device("cpu"), dtype=torch.float32)
    for index, frame in enumerate(found.frames):
        image = torch.from_numpy(scene(index, 40, 56).astype(np.float32) / 255).permute(2, 0, 1)[None]
        expected = restore(image, model.model(), Options(scale=2, **model.defaults))[0]
        luma = torch.einsum("chw,c->hw", expected, LUMA) * 219 + 16
        assert np.abs(stored(frame) - luma.numpy()).max() <= 0.51
    assert len(found.frames) == 2


def test_videos_and_images_go_into_one_folder(quick, tmp_path, capsys):
    make_clip(tmp_path / "a.mp4", frames=2)
    make_clip(tmp_path / "b.webm", frames=2, codec="libvpx-vp9", sound="libopus")
    write_picture(tmp_path / "c.png", Picture(photo(8, 8)))
    out = tmp_path / "out"
    inputs = [tmp_path / name for name in ("a.mp4", "b.webm", "c.png")]
    (tmp_path / "bad.mkv").write_bytes(b"no video")
    assert upscale(*inputs, tmp_path / "*.mkv", "-o", out, "--scale", "2", "--json") == 1
    files = json.loads(capsys.readouterr().out)["files"]
    assert [file["size"] for file in files] == [[128, 96], [128, 96], [16, 16], None]
    assert [file["status"] for file in files] == ["done", "done", "done", "failed"]
    assert sorted(path.name for path in out.iterdir()) == ["a.mp4", "b.mkv", "c.png"]


def test_a_folder_names_its_videos_and_leaves_them(quick, tmp_path, capsys):
    make_clip(tmp_path / "in.mp4", frames=2)
    write_picture(tmp_path / "c.png", Picture(photo(8, 8)))
    assert upscale(tmp_path, "-o", tmp_path / "out", "--scale", "2") == 0
    said = "left out 1 other file: 1 mp4; name videos one by one, or by a glob, to restore them\n"
    assert capsys.readouterr().err == said


def cut(path: Path, share: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    return path


def without_decoder(path: Path) -> Path:
    """With sound of a kind that nobody knows."""
    path.write_bytes(path.read_bytes().replace(b"ulaw", b"apxx"))
    return path


def sound_alone(path: Path) -> Path:
    import av

    from ..support.clips import write_sound

    with av.open(path, "w") as sink:
        audio = sink.add_stream("aac", rate=48000)
        write_sound(sink, audio, 0, 1)
    return path


PLAYLIST = "#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
FAULTS = {
    "no index.mp4": (lambda path: cut(make_clip(path, frames=50)), "cannot be read as a video: it is damaged"),
    "cut.mp4": (lambda path: cut(make_clip(path, frames=50, container={"movflags": "faststart"})), "is damaged: it ends after"),
    "cut.mkv": (lambda path: cut(make_clip(path, frames=50)), "is damaged: it ends after"),
    "cut.avi": (lambda path: cut(make_clip(path, frames=50, codec="mpeg4", sound="mp2")), "is damaged: it ends after"),
    "empty.mp4": (lambda path: path.write_bytes(b""), "is empty"),
    "page.mp4": (lambda path: path.write_text("<!doctype html>" * 99), "cannot be read as a video: it is damaged, or of a "),
    "list.mp4": (lambda path: path.write_text(PLAYLIST), "cannot be read as a video"),
    "sound.mp4": (sound_alone, "has no video stream"),
    "unknown sound.mov": (
        lambda path: without_decoder(make_clip(path, sound="pcm_mulaw")), "out.mp4: .mp4 cannot hold the sound of the input",
    ),
    "small.mkv": (
        lambda path: make_clip(path, height=6, width=8, codec="ffv1", pixels="yuv420p10le"),
        "out.mp4 cannot be written as libx265 video of 16x12 pixels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_is_one_error_and_nothing_stays(name, quick, tmp_path, capsys):
    make, message = FAULTS[name]
    make(tmp_path / name)
    assert upscale(tmp_path / name, "-o", tmp_path / "new" / "out.mp4", "--scale", "2") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("failed: ")
    assert name in line
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_sizes_that_change_are_refused(tmp_path, capsys):
    """Two transport streams in a row are one."""
    parts = [make_clip(tmp_path / f"{side}.ts", codec="mpeg2video", sound=None, width=side) for side in (64, 96)]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert upscale(tmp_path / "both.ts", "-o", tmp_path / "out.mkv") == 1
    assert "both.ts changes from 64x48 to 96x48 pixels after " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("clip.mp4", "x.png", "unknown format '.png'; expected one of .mp4, .m4v, .mov, .mkv, or a folder"),
        ("clip.mp4", "x.webm", "unknown format '.webm'; expected one of .mp4"),
        ("image.png", "x.mp4", "unknown format '.mp4'; expected one of .png"),
        ("clip.mp4", "clip.mp4", "would overwrite an input"),
        ("clip.mp4", "there.mp4", "there.mp4 exists already: add --existing overwrite"),
        ("*.*", "x.mp4", "expected a folder"),
    ],
)
def test_outputs_that_cannot_be_are_refused_at_once(source, output, message, tmp_path, capsys):
    make_clip(tmp_path / "clip.mp4", frames=1)
    write_picture(tmp_path / "image.png", Picture(photo(8, 8)))
    (tmp_path / "there.mp4").write_bytes(b"mine")
    assert upscale(tmp_path / source, "-o", tmp_path / output) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "there.mp4").read_bytes() == b"mine"


def test_without_pyav_the_message_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    make_clip(tmp_path / "clip.mp4", frames=1)
    monkeypatch.setitem(sys.modules, "av", None)
    assert upscale(tmp_path / "clip.mp4", "-o", tmp_path / "out.mp4") == 2
    error = capsys.readouterr().err
    assert f"clip.mp4: videos need the package av: pip install -e '.[video]' in {ROOT}" in error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_a_run_that_ends_early_leaves_what_was_there(error, tmp_path, capsys, monkeypatch):
    make_clip(tmp_path / "clip.mp4")
    (tmp_path / "out.mp4").write_bytes(b"old")
    count = 0

    def fail(image, model, options):
        nonlocal count
        count += 1
        if count == 4:
            raise error
        return image

    monkeypatch.setattr(upscale_command, "restore", fail)
    code = upscale(tmp_path / "clip.mp4", "-o", tmp_path / "out.mp4", "--scale", "1", "--existing", "overwrite")
    assert code == (130 if error is KeyboardInterrupt else 1)
    assert (tmp_path / "out.mp4").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "out.mp4"]


SWEEP = """
import json, resource, sys
from pathlib import Path
from tsdsr_core.video.reading import read_clip
from tsdsr_core.video import writing
from tsdsr_core.video.writing import write_clip

writing._ENCODERS[8][1]["x264-params"] = "mbtree=0"  # with which the same frames do not always give the same file
folder, found = Path(sys.argv[1]), []
clip = read_clip(folder / "in.mp4")
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for name in ("out.mp4", "out.mkv", "out.mov"):
    path = folder / name
    write_clip(clip, path, (48, 64), lambda rgb: rgb, lambda: None)
    needed = path.stat().st_size
    for room in (0, 100, needed // 2, needed - 1):
        path.write_bytes(b"old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
        try:
            write_clip(clip, path, (48, 64), lambda rgb: rgb, lambda: None)
            said = "nothing"
        except OSError as error:
            said = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        found.append([name, room, said, path.read_bytes() == b"old", sorted(entry.name for entry in folder.iterdir())])
    path.unlink()
print(json.dumps(found))
"""


@pytest.mark.posix
def test_no_shortage_of_room_is_taken_for_success(tmp_path):
    make_clip(tmp_path / "in.mp4", frames=12)
    command = [sys.executable, "-c", SWEEP, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=True, text=True)
    cases = json.loads(done.stdout)
    assert len(cases) == 12
    for name, room, said, kept, left in cases:
        assert said == f"{tmp_path / name} could not be written: the file would be larger than is allowed", (name, room)
        assert kept
        assert left == ["in.mp4", name]


@pytest.mark.posix
def test_names_that_are_addresses_to_ffmpeg_are_files(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_clip(Path("http:a %03d.mp4"), frames=2)
    assert upscale("http:a %03d.mp4", "-o", "pipe:1.mp4", "--scale", "2") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["http:a %03d.mp4", "pipe:1.mp4"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s left"), (59.4, "59 s left"), (59.6, "1 min left"), (200, "3 min left"), (3569, "59 min left"),
     (3571, "1 h 0 min left"), (7500, "2 h 5 min left"), (360000, "100 h 0 min left")],
)  # fmt: skip
def test_time_left_in_words(seconds, said):
    assert time_left(seconds) == said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_counts_files_and_frames_on_a_terminal_alone(quick, tmp_path, monkeypatch):
    for name in ("a.mp4", "b.mp4"):
        make_clip(tmp_path / name, frames=3)
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert upscale(tmp_path / "*.mp4", "-o", tmp_path / "out", "--scale", "2", "--existing", "overwrite") == 0
        shown = stream.getvalue()
        assert ("0/2 files" in shown) == ("2/2 files" in shown) == ("0/3 frames" in shown) == isinstance(stream, Terminal)
    assert shown == ""


def test_the_time_left_goes_by_what_was_done(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with bar(200, "frame") as frames:
        frames.start_t -= 36  # 12 frames of 3 s
        frames.update(12)
        frames.refresh()
    assert "12/200 frames, 9 min left" in stream.getvalue()
