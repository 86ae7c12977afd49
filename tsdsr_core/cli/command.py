"""The command ``tsdsr``: finds and runs the subcommand, and turns errors into messages and exit codes.

Exit codes: 0 done; 1 some inputs failed, memory or disk space ran out, a training diverged or standard output cannot be
written; 2 the command cannot be carried out as given; 128 and the signal's number where one ended it: 129, 130, 141 or 143.
A bug shows its traceback, with exit code 1.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError, installation
from ..system.imports import leave_out
from .help import HelpFormatter, Subparser

COMMANDS = {
    "upscale": "restore and enlarge images and videos",
    "bundle": "make a bundle: one file with LoRAs and embeddings, or a whole merged model",
    "info": "show what a LoRA, bundle, embedding or model folder is, and whether it fits",
    "eval": "compare a folder of results, or of inputs, with references",
    "bench": "measure time and memory against the published procedure",
    "perceptual-weights": "make the weights file for LPIPS and DISTS",
    "train": "train a one-step restorer; prepare data, export and evaluate",
}
_MODULES = {"eval": "evaluate", "perceptual-weights": "perceptual_weights"}
"""Modules whose name differs from the command's."""
_TEXTS = ("--prompt", "--caption-default")
"""Options whose text may be empty; any other empty argument is a path or a number that is missing."""
_NO_TRAINING = "this copy does not include the training code (tsdsr_core/train): clone the repository with git and run it there"

_LOST_WORKER = (
    "the system ended a process that prepares images, most likely because memory ran out (in a container, that of /dev/shm): "
    "use fewer such processes (--workers of tsdsr train prepare, data.workers of a training; with 0 there are none)"
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if arguments is None:
        _open_streams()
        _end_by_exception()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as for standard error: file names may have any bytes
        if arguments is None:
            sys.stdout = _Output(sys.stdout)
    if arguments is None and isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _Messages(sys.stderr)
    try:
        try:
            return _run(sys.argv[1:] if arguments is None else arguments, alone=arguments is None)
        finally:
            _flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of standard output: its reader, such as ``head``, has all that it wanted
        _drop(sys.stdout)
        return 141
    except _OutputError as error:
        _drop(sys.stdout)
        print(f"standard output could not be written: {error}", file=sys.stderr)
        return 1


def _open_streams() -> None:
    """Open what is closed of standard input, output and error (``2>&-``), or the next files would take their places."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - until the process ends


def _end_by_exception() -> None:
    """Let the signals of ``timeout``, job schedulers and closed terminals remove what is half-written, as Ctrl-C does."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, end)


class _OutputError(Exception):
    """Standard output cannot be written, for the reason in the message."""


class _Stream:
    """A stream with another way to write."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Output(_Stream):
    """Standard output whose errors are of a kind of their own, even where they come in the middle of the work."""

    def write(self, text: str) -> int:
        with _output_errors():
            return self._stream.write(text)

    def flush(self) -> None:
        with _output_errors():
            self._stream.flush()


class _Messages(_Stream):
    """Standard error, which nobody may be able to read (a log on a full disk): that changes neither results nor exit code."""

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            _drop(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            _drop(self._stream)


@contextmanager
def _output_errors() -> Iterator[None]:
    """Turn errors of the block, which writes standard output, into ``_OutputError``."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        from ..system.atomic import reason

        raise _OutputError(reason(error)) from error


def _flush() -> None:
    """Write what standard output holds back: its errors would come after the exit code."""
    if sys.stdout is not None:
        with _output_errors():
            sys.stdout.flush()


def _drop(stream: Any) -> None:
    """Let what a stream still holds back go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: list[str], alone: bool) -> int:
    """``alone``: whether this process runs nothing else."""
    hindrance = _hindrance(arguments)
    if hindrance is not None:
        print(f"tsdsr: error: {hindrance}", file=sys.stderr)
        return 2
    if alone:  # OpenCV reads it on import
        os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
        leave_out("torchvision")  # only pyiqa needs it; with another build of torch than it was made for, it does not load
    parser = argparse.ArgumentParser(prog="tsdsr", description="One-step restoration and enlargement of photographs.")
    parser.add_argument("--version", action="version", version=f"tsdsr {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Subparser)
    for name, summary in COMMANDS.items():
        there = name != "train" or _has_training()
        if not there and name in arguments[:1]:
            print(f"tsdsr train: error: {_NO_TRAINING}", file=sys.stderr)
            return 2
        if not there:
            continue
        sub = subparsers.add_parser(name, help=summary, formatter_class=HelpFormatter)
        if name in arguments[:1]:  # importing other commands, with torch and diffusers, would take seconds
            try:
                command = importlib.import_module("." + _MODULES.get(name, name), __package__)
            except (ImportError, RuntimeError) as error:
                if not _is_of_a_package(error):
                    raise
                _show_trace("--debug" in arguments)
                return _no_package(name, error)
            sub.description = command.__doc__  # plain text, without markup
            command.add_arguments(sub)
            sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
            sub.set_defaults(run=command.run, alone=alone)
            if name == "train":
                arguments = [name, *command.with_subcommand(arguments[1:])]
    options = parser.parse_args(arguments)
    _quieten()
    try:
        return options.run(options)
    except BrokenPipeError:
        raise
    except (InputError, OSError, FloatingPointError) as error:
        from ..system.atomic import is_full  # here, where torch is imported already

        _show_trace(options.debug)
        print(f"tsdsr {options.command}: error: {_message(error)}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) or is_full(error) else 2
    except (ImportError, RuntimeError, MemoryError) as error:
        if _is_of_a_package(error):  # one that is imported only where it is needed
            _show_trace(options.debug)
            return _no_package(options.command, error)
        said = _exhausted(error, options)
        if said is None:
            raise
        _show_trace(options.debug)
        print(f"tsdsr {options.command}: error: {said}", file=sys.stderr)
        return 1


def _hindrance(arguments: list[str]) -> str | None:
    """What keeps every command from running, or None."""
    if any(not given and option not in _TEXTS for option, given in itertools.pairwise(["", *arguments])):
        return "an argument is empty: is a variable of the script not set?"
    try:
        Path.cwd()
    except OSError as error:  # torch would abort the process
        return f"the current folder cannot be used ({error.strerror}): change to another one"
    return None


def _exhausted(error: Exception, options: argparse.Namespace) -> str | None:
    """What to say of an error that means that the machine has too little; None for others."""
    from ..system.atomic import reason  # here, where torch is imported already
    from ..system.memory import is_out_of_memory

    if str(error).startswith("DataLoader worker"):
        return _LOST_WORKER
    if not isinstance(error, MemoryError) and not is_out_of_memory(error):
        return None
    advice = getattr(options, "advice", "try another --device, or close programs")
    return f"out of memory; {advice} ({reason(error)})"


def _is_of_a_package(error: Exception) -> bool:
    """Whether an error says that another package is not installed or does not load."""
    if isinstance(error, ImportError):
        return not str(error.name).startswith(__name__.partition(".")[0])
    return str(error).startswith("Failed to import ")  # diffusers' own


def _no_package(command: str, error: Exception) -> int:
    """Say which package is missing or does not load, and which extra of the project has it; returns the exit code."""
    extra = command if command in ("bench", "train") else "cli"
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        said = f"{error.name.partition('.')[0]} is not installed"
    else:
        cause: BaseException = error
        while (deeper := cause.__cause__ or cause.__context__) is not None:
            cause = deeper
        said = f"an installed package does not load ({' '.join(str(cause).split())}). To install versions that fit each other"
    print(f"tsdsr {command}: error: {said}: {installation(extra)}", file=sys.stderr)
    return 2


def _show_trace(debug: bool) -> None:
    """Print the traceback of the current error."""
    if debug:
        traceback.print_exc()


class _Escaping(logging.Formatter):
    """Escapes control characters, which file names may contain, except line ends."""

    def format(self, record: logging.LogRecord) -> str:
        from ..system.atomic import one_line

        return "\n".join(one_line(line) for line in super().format(record).split("\n"))


def _quieten() -> None:
    """Send the log to standard error, without messages of image libraries about damage: our own messages name the file."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Escaping("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _message(error: Exception) -> str:
    """The message of an error on one line."""
    from ..system.atomic import one_line, reason

    if isinstance(error, OSError) and error.errno is not None:
        return one_line(reason(error) if error.filename is None else f"{os.fsdecode(error.filename)}: {reason(error)}")
    return one_line(str(error))


def _has_training() -> bool:
    """Whether the training code is installed: ComfyUI's registry delivers the pack without it."""
    return Path(__file__).parents[1].joinpath("train", "trainers.py").is_file()
