"""What is written is whole or is not there; failures name the file that was asked for, and say why in words."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tsdsr_core.checks import some
from tsdsr_core.images.files import Picture, read_picture, write_picture
from tsdsr_core.images.formats import FORMATS
from tsdsr_core.system.atomic import check_target, one_line, reason, torch_writer, write_bytes, write_files, write_tensors

from ..support.tiny import photo

ROOT = Path(__file__).parents[2]
NO_ROOM = "the file would be larger than is allowed"

SWEEP = """
import json, resource, sys
from pathlib import Path
import torch
from tsdsr_core.system.atomic import torch_writer, write_bytes, write_files, write_tensors
from tsdsr_core.images.formats import FORMATS
from tsdsr_core.images.files import Picture, write_picture

folder, found = Path(sys.argv[1]), []
tensors = {"a": torch.rand(5000)}
writers = {
    f"{depth}{suffix}": lambda path, depth=depth: write_picture(path, Picture(torch.rand(1, 3, 40, 60), deep=depth == "deep"))
    for suffix in FORMATS for depth in ("flat", "deep")
}
writers |= {
    "a.safetensors": lambda path: write_tensors(path, tensors),
    "a.pt": lambda path: write_files({path: torch_writer(tensors)}),
    "a.json": lambda path: write_bytes(path, b"x" * 5000),
}
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for name, write in writers.items():
    path = folder / name
    torch.manual_seed(0)
    write(path)
    whole, needed = path.read_bytes(), path.stat().st_size
    for there in (True, False):
        for room in (0, 1, 100, needed // 2, needed - 1):
            path.unlink(missing_ok=True)
            if there:
                path.write_bytes(b"old")
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
            torch.manual_seed(0)
            try:
                write(path)
                said = "nothing"
            except OSError as error:
                said = str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            left = [entry.name for entry in folder.iterdir()]
            kept = path.read_bytes() == b"old" if there else not path.exists()
            found.append([name, room, said, kept, left])
    path.unlink(missing_ok=True)
    write(path)
    path.unlink()
print(json.dumps(found))
"""


@pytest.mark.posix
def test_no_shortage_is_taken_for_success(tmp_path):
    """Every writer and format at every shortage, through the system's limit of file sizes."""
    process = subprocess.run(
        [sys.executable, "-c", SWEEP, str(tmp_path)], cwd=ROOT, capture_output=True, timeout=300, check=True, text=True
    )
    cases = json.loads(process.stdout)
    assert len(cases) == 10 * (2 * len(FORMATS) + 3)
    for name, room, said, kept, left in cases:
        assert said == f"{tmp_path / name} could not be written: {NO_ROOM}", (name, room)
        assert kept, (name, room)
        assert left in ([], [name]), (name, room)


def in_namespace(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a shell script that may mount file systems, which are gone with it; skips where the system does not allow that."""
    probe = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*probe, "mount -t tmpfs none /tmp"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no mounts in a namespace here")
    command = [*probe, script, "sh", sys.executable, *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=240, text=True)


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    write_picture(tmp_path / "in" / "a.jpg", Picture(torch.rand(1, 3, 64, 96)))
    write_picture(tmp_path / "in" / "b.png", Picture(photo(8, 8)))
    (tmp_path / "out").mkdir()
    done = in_namespace(
        'mount -t tmpfs -o size=20k none "$3"; "$1" -m tsdsr_core upscale "$2" -o "$3"; echo code $?; ls -A "$3"',
        str(tmp_path / "in"), str(tmp_path / "out"),
    )  # fmt: skip
    first, *others = done.stdout.splitlines()
    assert first.startswith(f"{tmp_path / 'out' / 'b.png'}  32x32"), "the batch goes on"
    assert others == ["code 1", "b.png"]
    named = f"{tmp_path / 'in' / 'a.jpg'}: {tmp_path / 'out' / 'a.jpg'}"
    assert done.stderr == f"failed: {named} could not be written: no space left on the device\n"


def test_a_read_only_file_system_is_named_before_the_work(tmp_path):
    write_picture(tmp_path / "a.png", Picture(photo(8, 8)))
    (tmp_path / "out").mkdir()
    done = in_namespace(
        'mount -t tmpfs -o ro none "$3"; "$1" -m tsdsr_core upscale "$2"/a.png -o "$3"/x.png; echo code $?',
        str(tmp_path), str(tmp_path / "out"),
    )  # fmt: skip
    assert done.stdout == "code 1\n"
    assert "x.png could not be written: the file system is read-only" in done.stderr


@pytest.mark.posix
def test_a_folder_without_permission(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "old.png").write_bytes(b"old")
    for parent in (tmp_path, *tmp_path.parents[:3]):
        if parent.stat().st_uid == os.geteuid():
            parent.chmod(0o755)
    folder.chmod(0o555)
    (folder / "old.png").chmod(0)
    before, nobody = os.geteuid(), 65534
    if before == 0:
        os.seteuid(nobody)  # root may write anywhere
    try:
        for name in ("new.png", "old.png", "deeper/new.png"):
            for write in (check_target, lambda path: write_picture(path, Picture(photo(8, 8)))):
                with pytest.raises(OSError, match="permission denied") as caught:
                    write(folder / name)
                assert str(caught.value) == f"{folder / name} could not be written: permission denied"
        with pytest.raises(ValueError, match=r"old\.png cannot be read as an image: permission denied"):
            read_picture(folder / "old.png")
    finally:
        os.seteuid(before)
        folder.chmod(0o755)
    assert [path.name for path in folder.iterdir()] == ["old.png"]


@pytest.mark.posix
def test_results_that_cannot_be_are_named_with_the_reason(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    before = sorted(tmp_path.iterdir())
    for name, why in (
        ("file/x.png", "a part of its path is not a folder"),
        ("folder.png", "it is a folder"),
        ("loop.png", "a symbolic link in its path leads back to itself"),
        ("loop.png/x.png", "a symbolic link in its path leads back to itself"),
        ("pipe.png", "it is not a regular file"),
        (f"{'x' * 252}.png", "the name is too long"),
    ):
        for write in (check_target, lambda path: write_picture(path, Picture(photo(8, 8)))):
            with pytest.raises(OSError, match=why) as caught:
                write(tmp_path / name)
            assert str(caught.value) == f"{tmp_path / name} could not be written: {why}"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.posix
@pytest.mark.parametrize(
    "name",
    [
        "фото 写真 🙂.png", pytest.param(b"not utf-8 \xff\xfe.png", marks=pytest.mark.linux), "line\nend.png",
        "-dash.png", "trailing .png", "a*b[1]?\".png",
        "x" * 251 + ".png", "写" * 83 + "xy.png", "%date%.png", "$HOME.png", "\x1b[31mred.png",
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
@pytest.mark.parametrize("deep", [False, True])
def test_any_name_is_written_and_read(name, suffix, deep, tmp_path):
    path = tmp_path / os.fsdecode(name)
    path = path.with_name(path.name.removesuffix(".png") + suffix)
    write_picture(path, Picture(photo(8, 8), deep=deep))
    back = read_picture(path)
    assert (back.rgb - photo(8, 8)).abs().mean() < 0.03
    assert back.deep == (deep and suffix != ".jpg")
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "deeper").mkdir()
    for name in ("there", "dangling"):
        target = tmp_path / "deeper" / f"{name}.bin"
        if name == "there":
            target.write_bytes(b"old")
        (tmp_path / name).symlink_to(target)
        write_bytes(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink()
        assert target.read_bytes() == b"new"


def test_folders_made_for_a_file_that_fails_do_not_stay(tmp_path):
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.EIO, "whatever")

    def interrupted(path: Path) -> None:
        (tmp_path / "there" / "other").touch()
        raise KeyboardInterrupt

    for folder in ("new", "there/new/deeper"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(OSError, match="could not be written"):
            write_files({tmp_path / folder / "a": lambda path: path.write_bytes(b"new"), tmp_path / folder / "b": fail})
        assert [path.name for path in tmp_path.rglob("*")] == ["there"], folder
    (tmp_path / "there").rmdir()
    with pytest.raises(KeyboardInterrupt):
        write_files({tmp_path / "there" / "a" / "b": interrupted})
    assert [path.name for path in tmp_path.rglob("*")] == ["there", "other"], "what others have put there stays"
    with pytest.raises(OSError, match="the name is too long"):
        write_bytes(tmp_path / "x" / ("y" * 300) / "z", b"")
    assert not (tmp_path / "x").exists()
    write_bytes(tmp_path / "x" / "y" / "z", b"whole")
    assert (tmp_path / "x" / "y" / "z").read_bytes() == b"whole"


def test_files_written_together_appear_together_or_not_at_all(tmp_path):
    (tmp_path / "old").write_bytes(b"old")

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.EIO, "whatever", str(path))

    with pytest.raises(OSError, match="could not be written") as caught:
        write_files({tmp_path / "old": lambda path: path.write_bytes(b"new"), tmp_path / "b": fail})
    assert str(caught.value) == f"{tmp_path / 'b'} could not be written: {os.strerror(errno.EIO)}"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"
    tensors = {"a": torch.rand(3, 4)}
    write_files({tmp_path / "old": lambda path: path.write_bytes(b"new"), tmp_path / "t.pt": torch_writer(tensors)})
    write_tensors(tmp_path / "t.safetensors", tensors)
    assert torch.equal(torch.load(tmp_path / "t.pt", weights_only=True)["a"], tensors["a"])
    assert torch.equal(load_file(tmp_path / "t.safetensors")["a"], tensors["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "t.pt", "t.safetensors"]


def test_reasons_are_words_on_one_line():
    assert reason(OSError(errno.ENOSPC, "x", "/hidden/.tmp-1")) == "no space left on the device"
    assert reason(PermissionError(errno.EACCES, "x")) == "permission denied"
    assert reason(MemoryError()) == "not enough memory"
    assert reason(ValueError("one\ntwo")) == "one"
    assert reason(KeyError()) == "KeyError"
    assert reason(KeyError(0)) == "KeyError 0", "a number alone says nothing"
    assert one_line("a\nb\x1b[0m\udcffü🙂") == "a\\nb\\x1b[0m\\udcffü🙂"


def test_lists_of_names_in_messages_stay_short():
    names = [f"{letter * 60}.safetensors" for letter in "abc"]
    assert some(names) == f"{names[0]}, {names[1]} and 1 more"
    assert some([name * 3 for name in names]) == f"{names[0] * 3} and 2 more", "one is always shown"
    assert some("abcdefgh") == "a, b, c, d, e, f, g, h"
