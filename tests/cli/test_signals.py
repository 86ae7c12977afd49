"""How the command ends from outside: signals, and a standard output that takes nothing more."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import BUILTIN
from tsdsr_core.images.files import Picture, read_picture, write_picture

from ..support.tiny import photo

ROOT = Path(__file__).parents[2]
WRITE = """
import sys, time
from pathlib import Path
from tsdsr_core.cli import command
from tsdsr_core.system.atomic import write_files

def write(path):
    path.write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)

command._run = lambda arguments, alone: write_files({Path(sys.argv[1]): write})
command.main()
"""


def start(*arguments: str, **options) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, **options)


@pytest.mark.posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_ends_the_process_leaves_nothing_half_written(name, tmp_path):
    path = tmp_path / "new" / "out.png"
    process = start(
        "-c", WRITE, str(path), stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.Signals[name])
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 128 + signal.Signals[name]
    assert not list(tmp_path.iterdir())


@pytest.mark.posix
def test_a_reader_that_has_enough_is_no_error():
    """As with ``| head``."""
    reading, writing = os.pipe()
    os.close(reading)
    process = start("-m", "tsdsr_core", "--help", stdout=writing)
    os.close(writing)
    assert process.communicate(timeout=60)[1] == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.linux
def test_a_report_that_cannot_be_written_is_one_line():
    with Path("/dev/full").open("w") as full:
        process = start("-m", "tsdsr_core", "--help", stdout=full)
    assert process.communicate(timeout=60)[1] == b"standard output could not be written: no space left on the device\n"
    assert process.returncode == 1


@pytest.mark.linux
def test_a_report_that_cannot_be_written_is_no_error_of_the_command():
    """Unbuffered, as in containers, the error comes in the middle of the command."""
    command = f"{sys.executable} -u -m tsdsr_core info {BUILTIN} > /dev/full"
    process = subprocess.run(command, shell=True, cwd=ROOT, stderr=subprocess.PIPE, timeout=120)
    assert process.stderr == b"standard output could not be written: no space left on the device\n"
    assert process.returncode == 1


@pytest.mark.posix
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_error(closed, tmp_path):
    """As under some job schedulers; no file of ours takes their places."""
    write_picture(tmp_path / "a.png", Picture(photo(8, 8)))
    command = f"{sys.executable} -m tsdsr_core upscale {tmp_path}/a.png -o {tmp_path}/b.png --scale 1 {closed}"
    assert subprocess.run(command, shell=True, cwd=ROOT, timeout=120).returncode == 0
    assert read_picture(tmp_path / "b.png").rgb.shape == (1, 3, 8, 8)


@pytest.mark.posix
def test_a_current_folder_that_is_gone_is_one_line(tmp_path):
    command = f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; {sys.executable} -m tsdsr_core info x"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, shell=True, env=environment, stderr=subprocess.PIPE, timeout=120)
    expected = b"tsdsr: error: the current folder cannot be used (No such file or directory): change to another one\n"
    assert (process.stderr, process.returncode) == (expected, 2)


@pytest.mark.parametrize("arguments", [["upscale", "", "-o", "out"], ["upscale", "x.png", "-o", ""], ["info", ""]])
def test_an_empty_argument_is_not_the_current_folder(arguments, capsys):
    """As of ``"$FOLDER"`` in a script where it is not set."""
    assert main(arguments) == 2
    assert capsys.readouterr().err == "tsdsr: error: an argument is empty: is a variable of the script not set?\n"


@pytest.mark.parametrize("option", ["--prompt", "--caption-default"])
def test_the_text_of_a_prompt_or_caption_may_be_empty(option, tmp_path, capsys):
    assert main(["train", "prepare", "-o", str(tmp_path / "out"), "--base", str(tmp_path), option, ""]) == 2
    assert "an argument is empty" not in capsys.readouterr().err


@pytest.mark.linux
def test_messages_that_cannot_be_written_change_neither_report_nor_exit_code(tmp_path):
    """As where a log is on a full disk."""
    write_picture(tmp_path / "in" / "in.png", Picture(photo(16, 24)))
    (tmp_path / "in" / "notes.txt").write_text("x")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "tsdsr_core", "upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=full, text=True)
        assert (done.returncode, done.stdout.count("96x64")) == (0, 1)
        missing = subprocess.run([sys.executable, "-m", "tsdsr_core", "info", "none"], cwd=ROOT, stderr=full)
        assert missing.returncode == 2
