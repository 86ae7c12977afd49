"""The command line on files as people have them: odd names, damage, foreign files, and outputs that cannot be."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tsdsr_core.cli import command as cli
from tsdsr_core.cli import main, prepare
from tsdsr_core.cli import upscale as upscale_command
from tsdsr_core.errors import installation
from tsdsr_core.images.files import Picture, read_picture, write_picture
from tsdsr_core.images.jobs import collect, plan_jobs
from tsdsr_core.train import evaluation_set
from tsdsr_core.train.config_file import read_config
from tsdsr_core.train.data.degradations import degrade
from tsdsr_core.train.data.prepared import Prepared
from tsdsr_core.train.evaluation_set import make_evaluation_set
from tsdsr_core.train.networks.text import read_captions

from ..support.published import published_files
from ..support.tiny import photo

ROOT = Path(__file__).parents[2]
ODD = {
    "emoji 🙂.png": "emoji \\U0001f642.png", "line\nend.png": "line\\nend.png", os.fsdecode(b"raw \xff.png"): "raw \\udcff.png",
    os.fsdecode(b"raw \xfe.tif"): "raw \\udcfe.tif", "-dash.png": "-dash.png", "x" * 251 + ".png": "x" * 251 + ".png",
    "\x1b[2Jclear.png": "\\x1b[2Jclear.png",
}  # fmt: skip
"""Names, and how they are shown where standard output is cp1252."""


def upscale(*arguments) -> int:
    return main(["upscale", "--scale", "1", *map(str, arguments)])


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, timeout=240)


@pytest.fixture
def odd(tmp_path) -> Path:
    """A folder of good images of odd names, 8 and 16 bits."""
    for number, name in enumerate(ODD):
        write_picture(tmp_path / "in" / name, Picture(photo(8, 8, number), deep="raw" in name))
    return tmp_path / "in"


def cut_tiff(path: Path) -> None:
    """A damaged TIFF of 16 bits, which OpenCV reads."""
    array = (photo(32, 32)[0].permute(1, 2, 0).numpy() * 65535).astype(np.uint16)
    data = cv2.imencode(".tif", array, [cv2.IMWRITE_TIFF_COMPRESSION, 5])[1].tobytes()
    path.write_bytes(data[:1000] + bytes(200) + data[1200:])


@pytest.mark.linux
def test_names_that_the_output_cannot_encode_are_shown_escaped(odd, tmp_path):
    (odd / os.fsdecode(b"bad \xfd.png")).write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    cut_tiff(odd / "cut.tif")
    out = tmp_path / "out"
    done = run("-m", "tsdsr_core", "upscale", str(odd), "-o", str(out), "--scale", "1", PYTHONIOENCODING="cp1252")
    assert done.returncode == 1, "for the damaged one"
    shown = sorted(line.removeprefix(f"{out}/").partition("  8x")[0] for line in done.stdout.decode("cp1252").splitlines())
    assert shown == sorted(ODD.values()), "one line for each"
    errors = done.stderr.decode("cp1252").splitlines()
    assert len(errors) == 2, "image libraries say nothing of their own"
    for name, error in zip(
        ("bad \\udcfd.png cannot be read as an image", "cut.tif has 16 bits per channel"), errors, strict=True
    ):
        assert name in error
    assert sorted(path.name for path in out.iterdir()) == sorted(ODD)
    assert all(read_picture(path).deep == ("raw" in path.name) for path in out.iterdir())
    shutil.rmtree(out)
    (odd / os.fsdecode(b"bad \xfd.png")).unlink()
    (odd / "cut.tif").unlink()
    done = run("-m", "tsdsr_core", "upscale", str(odd), "-o", str(out), "--scale", "1", "--json", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    files = json.loads(done.stdout)["files"]
    assert {Path(file["output"]).name for file in files} == set(ODD)


@pytest.mark.posix
def test_the_batch_goes_on_and_says_what_was_left_out_and_what_failed(tmp_path, capsys):
    folder = tmp_path / "in"
    for number in range(2):
        write_picture(folder / f"{number}.png", Picture(photo(8, 8, number)))
    whole = (folder / "0.png").read_bytes()
    bad = {
        "cut.png": whole[: len(whole) // 2], "empty.jpg": b"", "text.tif": b"hello", "page.webp": b"<!DOCTYPE html><html>",
        "bomb.bmp": b"BM" + bytes(16) + b"\x28\0\0\0" + b"\xff\xff\xff\x0f" * 2 + b"\1\0\x18\0" + bytes(40),
    }  # fmt: skip
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    for name in ("a.PSD", "b.psd", "c.cr2", "d.NEF", "e.gif", "notes.txt", "f.jp2", "no_suffix", ".hidden.psd"):
        (folder / name).write_bytes(b"")
    (folder / "dir.png").mkdir()
    (folder / "broken.png").symlink_to(folder / "none.png")
    os.mkfifo(folder / "pipe.png")
    said = "left out 10 other files: 1 GIF, 1 JPEG 2000, 2 PSD, 1 broken link, 1 no suffix, 2 raw, 1 special file, 1 txt"
    assert upscale(folder, "-o", tmp_path / "out") == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines[0] == said
    assert [name for name in sorted(bad) if not any(name in line for line in lines[1:])] == []
    assert len(lines) == 1 + len(bad)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png"]
    assert upscale(folder, "-o", tmp_path / "out", "--existing", "skip", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert report["left_out"]["PSD"] == 2
    assert sum(file["status"] == "failed" for file in report["files"]) == len(bad)


@pytest.mark.posix
def test_what_is_no_file_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.png")
    assert upscale(tmp_path / "pipe.png", "-o", tmp_path / "out") == 1
    assert "pipe.png is not a file" in capsys.readouterr().err


def test_heic_and_jpeg_xl_go_to_png_and_say_what_they_need(tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed, wherever this runs
    from tsdsr_core.images import formats

    formats._load.cache_clear()
    try:
        assert upscale(tmp_path / "in", "-o", tmp_path / "out") == 2
        assert "pip install pillow-heif to read HEIC" in capsys.readouterr().err
        assert upscale(tmp_path / "in" / "a.heic", "-o", tmp_path / "out") == 1
        assert "a.heic: HEIF images need a plug-in: pip install pillow-heif" in capsys.readouterr().err
    finally:
        formats._load.cache_clear()
    inputs = collect([str(tmp_path / "in" / "a.heic")])
    assert plan_jobs(inputs, tmp_path / "out", "error")[0].output == tmp_path / "out" / "a.png"
    with pytest.raises(ValueError, match=r"unknown format '\.heic'"):
        plan_jobs(inputs, tmp_path / "x.heic", "error")


def test_outputs_that_cannot_be_end_in_one_line_before_the_work(tmp_path, capsys, monkeypatch):
    write_picture(tmp_path / "a.png", Picture(photo(8, 8)))
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "file").touch()
    monkeypatch.setattr(upscale_command, "restore", None)
    for output, why in (
        ("loop.png", "a symbolic link in its path leads back to itself"),
        ("file/x.png", "a part of its path is not a folder"),
    ):
        assert upscale(tmp_path / "a.png", "-o", tmp_path / output) == 1
        path = tmp_path / output
        assert capsys.readouterr().err == f"failed: {tmp_path / 'a.png'}: {path} could not be written: {why}\n"
    assert upscale(tmp_path / "a.png", "-o", tmp_path / ("y" * 252 + ".png")) == 2
    assert "yyy.png: the name is too long" in capsys.readouterr().err
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    assert upscale(tmp_path / "a.png", "-o", tmp_path / "out", "--existing", "overwrite") == 2
    assert "out/a.png is a folder" in capsys.readouterr().err


def test_running_out_of_host_memory_is_said_and_the_batch_goes_on(tmp_path, capsys, monkeypatch):
    for number in range(2):
        write_picture(tmp_path / "in" / f"{number}.png", Picture(photo(8, 8, number)))
    read = upscale_command.read_picture

    def refuse(path: Path) -> Picture:
        if path.name == "0.png":
            raise MemoryError
        return read(path)

    monkeypatch.setattr(upscale_command, "read_picture", refuse)
    assert upscale(tmp_path / "in", "-o", tmp_path / "out") == 1
    assert "0.png: not enough memory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.png"]


def test_metadata_goes_through_the_command(tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Camera"
    exif[0x8769] = {0xA002: 20, 0xA003: 12}
    image = Image.fromarray((photo(12, 20)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    image.save(tmp_path / "a.jpg", exif=exif, icc_profile=b"no profile")
    assert main(["upscale", str(tmp_path / "a.jpg"), "-o", str(tmp_path / "b.png"), "--scale", "2"]) == 0
    result = Image.open(tmp_path / "b.png")
    assert result.size == (24, 40)
    assert result.getexif()[0x0112] == 1
    assert result.getexif().get_ifd(0x8769) == {0xA002: 24, 0xA003: 40}


def test_eval_leaves_damaged_images_out_and_ends_with_1(tmp_path, capsys):
    for number in range(3):
        write_picture(tmp_path / "hq" / f"{number}.png", Picture(photo(24, 24, number)))
        write_picture(tmp_path / "lq" / f"{number}.png", Picture(photo(24, 24, number) * 0.9))
    (tmp_path / "lq" / "1.png").write_bytes(b"")
    arguments = ["eval", "--lq", str(tmp_path / "lq"), "--hq", str(tmp_path / "hq")]
    assert main([*arguments, "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert set(report["files"]) == {"0", "2"}
    assert list(report["failed"]) == ["1"]
    assert "lq/1.png is empty" in captured.err
    assert main(arguments) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("mean")
    for number in (0, 2):
        (tmp_path / "lq" / f"{number}.png").write_bytes(b"")
    assert main(arguments) == 2
    assert "none of the 3 pairs can be compared" in capsys.readouterr().err


def test_an_evaluation_set_is_made_of_the_good_images(tmp_path, caplog):
    for number in range(2):
        write_picture(tmp_path / "in" / f"{number}.bmp", Picture(photo(512, 512, number)))
    data = (tmp_path / "in" / "0.bmp").read_bytes()
    (tmp_path / "in" / "0.bmp").write_bytes(data[:2000])
    (tmp_path / "in" / "page.png").write_text("<!DOCTYPE html><html>404 Not Found</html>")
    arguments = ["train", "evalset", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--presets", "light"]
    assert main(arguments) == 1, "some inputs failed"
    assert len(caplog.messages) == 2
    assert "0.bmp" in caplog.text
    assert "page.png cannot be read as an image: its content is a web page" in caplog.text
    assert [path.name for path in (tmp_path / "out" / "lq-light").iterdir()] == ["1.png"]
    (tmp_path / "in" / "1.bmp").unlink()
    with pytest.raises(ValueError, match=r"none of the 2 images can be read: .*page\.png"):
        make_evaluation_set(tmp_path / "in", tmp_path / "out", ["light"])


@pytest.mark.linux
def test_names_of_any_bytes_are_prepared_and_evaluated(tmp_path):
    """The random numbers of an image depend on its name."""
    photos = tmp_path / "in"
    write_picture(photos / os.fsdecode(b"raw \xff.png"), Picture(photo(512, 512)))
    assert main(["train", "evalset", str(photos), "--out", str(tmp_path / "set")]) == 0
    assert (tmp_path / "set" / "lq-medium" / os.fsdecode(b"raw \xff.png")).is_file()
    arguments = ["--base", "builtin", "--crop", "32", "--workers", "0", "--device", "cpu"]
    assert main(["train", "prepare", str(photos), "-o", str(tmp_path / "out"), *arguments]) == 0
    folder = Prepared(tmp_path / "out")
    assert [path.name for path in folder.paths] == [os.fsdecode(b"raw \xff.png-0.safetensors")]
    assert folder.read(0, ["high"])["high"].shape == (3, 32, 32)


@pytest.mark.posix
@pytest.mark.parametrize("kind", ["pipe", "folder", "broken link", "loop", "below a file"])
def test_what_is_no_file_is_called_what_it_is(kind, tmp_path, capsys):
    """In each command and option that reads weights; a pipe is not waited for."""
    path = tmp_path / "x.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "below a file":
        path.write_text("")
        path /= "y.safetensors"
    else:
        path.symlink_to(path if kind == "loop" else tmp_path / "none")
    expected = {
        "pipe": "is a pipe or a device, not a file", "folder": "is a folder, not a file",
        "broken link": "is a symbolic link to a file that does not exist",
        "loop": "cannot be read: a symbolic link in its path leads back to itself",
        "below a file": "cannot be read: a part of its path is not a folder",
    }[kind]  # fmt: skip
    out, images = ["-o", str(tmp_path / "out.safetensors")], tmp_path / "images"
    write_picture(images / "a.png", Picture(photo(16, 16)))
    commands = [
        ["perceptual-weights", "--lpips", str(path), "--dists", str(path), *out], ["train", "export", str(path), *out],
        ["eval", "--lq", str(images), "--hq", str(images), "--metrics", "lpips", "--perceptual-weights", str(path)],
    ]  # fmt: skip
    if kind != "folder":  # which these take
        commands += [["info", str(path)], ["bundle", "--lora-dir", str(path), *out]]
        commands += [["upscale", str(images), "-o", str(tmp_path / "results"), "--model", str(path)]]
    for command in commands:
        assert main(command) == 2, command
        assert expected in capsys.readouterr().err, command
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("command", ["bundle", "perceptual-weights", "run", "prepare", "evalset"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(command, tmp_path, capsys):
    """Nothing of the input is read: it is missing, or damaged."""
    (tmp_path / "file").write_text("")
    target, none = tmp_path / "file" / "out.safetensors", str(tmp_path / "none")
    write_picture(tmp_path / "in" / "0.bmp", Picture(photo(512, 512)))
    data = (tmp_path / "in" / "0.bmp").read_bytes()
    (tmp_path / "in" / "0.bmp").write_bytes(data[:2000])
    config = str(ROOT / "tsdsr_core" / "train" / "configs" / "smoke.toml")
    arguments = {
        "bundle": ["bundle", "--merge", "--model", none, "-o", str(target)],
        "perceptual-weights": ["perceptual-weights", "--lpips", none, "--dists", none, "-o", str(target)],
        "run": ["train", config, "--photos", none, "--out", str(target)],
        "prepare": ["train", "prepare", none, "--base", none, "-o", str(target)],
        "evalset": ["train", "evalset", str(tmp_path / "in"), "--out", str(target)],
    }[command]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "could not be written: " in error
    assert "is not a folder" in error
    assert (tmp_path / "file").read_text() == ""


def test_an_interrupted_evaluation_set_has_whole_images_only(tmp_path, monkeypatch, capsys):
    """An original without its inputs would stay uncompared."""
    write_picture(tmp_path / "in" / "0.png", Picture(photo(512, 512)))
    write_picture(tmp_path / "in" / "1.png", Picture(photo(512, 512, 1)))
    done = []

    def interrupted(*arguments):
        done.append(arguments[2])
        if len(done) == 4:
            raise KeyboardInterrupt
        return degrade(*arguments)

    monkeypatch.setattr(evaluation_set, "degrade", interrupted)
    arguments = ["train", "evalset", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--presets", "light", "medium"]
    assert main(arguments) == 130
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")) == [
        "hq/0.png", "lq-light/0.png", "lq-medium/0.png"
    ]  # fmt: skip


def test_an_evaluation_set_overwrites_no_photograph(tmp_path, capsys):
    write_picture(tmp_path / "hq" / "0.png", Picture(photo(520, 512)))
    before = (tmp_path / "hq" / "0.png").read_bytes()
    assert main(["train", "evalset", str(tmp_path / "hq"), "--out", str(tmp_path)]) == 2
    assert "hq/0.png would overwrite a photograph: choose another --out" in capsys.readouterr().err
    assert (tmp_path / "hq" / "0.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["hq"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_files_with_a_byte_order_mark_are_read(encoding, tmp_path):
    (tmp_path / "c.toml").write_bytes('stage = "student"\r\n[run]\r\nsteps = 7 # ü\r\n'.encode(encoding))
    assert read_config(tmp_path / "c.toml").run.steps == 7
    if encoding == "utf-8-sig":
        (tmp_path / "a.txt").write_bytes("a cat".encode(encoding))
        assert read_captions([tmp_path / "a.png"], None) == {tmp_path / "a.png": "a cat"}


def test_a_copy_without_the_training_code_does_not_offer_it(tmp_path):
    """As ComfyUI's registry delivers the pack."""
    files = [path for path in published_files() if path.parts[0] == "tsdsr_core" and path.suffix == ".py"]
    assert not any("train" in path.parts for path in files)
    for path in files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    done = run("-m", "tsdsr_core", "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert b"upscale" in done.stdout
    assert b"train" not in done.stdout
    done = run("-m", "tsdsr_core", "train", "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert b"this copy does not include the training code" in done.stderr
    assert b"pip" not in done.stderr


def test_the_advice_of_an_installed_package_names_packages(tmp_path, monkeypatch):
    from tsdsr_core import errors

    assert installation("cli") == f"pip install -e '.[cli]' in {ROOT}"
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages" / "tsdsr_core" / "extras.py"))
    monkeypatch.setattr(
        errors.importlib.metadata, "requires",
        lambda name: ["torch>=2", 'tqdm; extra == "cli"', 'tsdsr[cli]; extra == "train"', 'peft>=0.17; extra == "train"'],
    )  # fmt: skip
    assert installation("train") == "pip install 'tqdm' 'peft>=0.17'"


def test_errors_of_the_system_are_said_in_words(tmp_path, capsys, monkeypatch):
    def fail(options):
        raise PermissionError(13, "Permission denied", "some\nfile")

    monkeypatch.setattr(upscale_command, "run", fail)
    assert upscale("x.png", "-o", "y.png") == 2
    assert capsys.readouterr().err == "tsdsr upscale: error: some\\nfile: permission denied\n"
    assert cli.COMMANDS["train"]


def test_a_folder_with_alpha_under_names_without_it_says_what_to_do(tmp_path, capsys):
    """As of PNG files called .jpg; the others are done, and what is advised works."""
    folder, out = tmp_path / "in", tmp_path / "out"
    write_picture(folder / "a.png", Picture(photo(8, 8), alpha=torch.full((1, 1, 8, 8), 0.5)))
    (folder / "a.png").rename(folder / "a.jpg")
    write_picture(folder / "b.png", Picture(photo(8, 8)))
    assert upscale(folder, "-o", out) == 1
    advice = f"restore it by itself, with -o {out / 'a.png'}"
    assert capsys.readouterr().err.strip().endswith(advice)
    assert [path.name for path in out.iterdir()] == ["b.png"]
    assert upscale(folder / "a.jpg", "-o", out / "a.png") == 0
    assert read_picture(out / "a.png").alpha is not None


@pytest.mark.linux
def test_a_worker_that_the_system_ends_is_one_line(tmp_path, capfd, monkeypatch):
    """As where memory runs out."""
    write_picture(tmp_path / "in" / "a.png", Picture(photo(40, 40)))
    monkeypatch.setattr(prepare, "make_crops", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
    arguments = ["--base", "builtin", "--crop", "32", "--workers", "1", "--device", "cpu"]
    assert main(["train", "prepare", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *arguments]) == 1
    (error,) = capfd.readouterr().err.splitlines()
    assert error.startswith(
        "tsdsr train: error: the system ended a process that prepares images, most likely because memory ran out"
    )
