"""The command ``tsdsr``: its subcommands and what their outcome means to a shell.

Exit codes: 0 done, 1 some input failed, memory ran out or a training broke down, 2 the command cannot be carried out as
given, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys

from . import __version__

COMMANDS = {
    "upscale": "restore and enlarge pictures",
    "bundle": "make a bundle: one file with LoRAs and embeddings, or a whole merged model",
    "info": "say what a LoRA, bundle, embedding or model folder is, and whether it fits",
    "eval": "compare a folder of results, or of inputs, with references",
    "bench": "measure time and memory against the published procedure",
    "train": "train a one-step restorer, or prepare, export and check what that takes",
}
_MODULES = {"eval": "commands.evaluate", "train": "train.command"}
"""Where it is not ``commands.NAME``."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tsdsr", description="One-step restoration and enlargement of photographs.")
    parser.add_argument("--version", action="version", version=f"tsdsr {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if name in arguments[:1]:  # a command's module loads torch and diffusers: seconds that --help need not wait
            try:
                command = importlib.import_module("." + _MODULES.get(name, f"commands.{name}"), __package__)
            except ModuleNotFoundError as error:
                extra = name if name in ("bench", "train") else "cli"
                advice = f"pip install -e '.[{extra}]' in the project's folder"
                print(f"tsdsr {name}: error: {error.name} is not installed: {advice}", file=sys.stderr)
                return 2
            sub.description = command.__doc__
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        return options.run(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"tsdsr {options.command}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except (RuntimeError, MemoryError) as error:
        from .memory import is_out_of_memory  # here, where torch is loaded already

        if not isinstance(error, MemoryError) and not is_out_of_memory(error):
            raise
        advice, said = getattr(options, "advice", "try another --device, or close programs"), str(error).partition("\n")[0]
        print(f"tsdsr {options.command}: error: out of memory; {advice} ({said or type(error).__name__})", file=sys.stderr)
        return 1
