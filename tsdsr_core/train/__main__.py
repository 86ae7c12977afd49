"""``python -m tsdsr_core.train``: train a small restorer from photographs, export it, make evaluation pictures."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

from ..bundle import write_bundle
from .config import check, read_config
from .data import load_photos
from .degradations import PRESETS
from .evaluation import SIDE, make_evaluation_set
from .supervised import CHECKPOINT, export, load_checkpoint, new_state, read_checkpoint_config, train


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m tsdsr_core.train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="train")
    run.add_argument("config", type=Path, help="TOML file, such as tsdsr_core/train/configs/builtin.toml")
    run.add_argument("--photos", type=Path, nargs="+", required=True, help="folders of photographs")
    run.add_argument("--out", type=Path, required=True, help="folder for the checkpoint last.pt")
    run.add_argument("--resume", type=Path, help="checkpoint to go on from")
    run.add_argument("--steps", type=int, help="overrides the configured number of steps")
    run.set_defaults(action=_run)

    exported = commands.add_parser("export", help="write a checkpoint's averaged weights as a bundle")
    exported.add_argument("checkpoint", type=Path)
    exported.add_argument("-o", "--output", type=Path, required=True, help="the .safetensors file to write")
    exported.set_defaults(action=_export)

    evaluation = commands.add_parser("evalset", help=f"make {SIDE}x{SIDE} references and their degraded inputs")
    evaluation.add_argument("photos", type=Path, help="folder of photographs")
    evaluation.add_argument("--out", type=Path, required=True, help="folder for hq/ and lq-PRESET/")
    evaluation.add_argument("--presets", nargs="+", choices=PRESETS, default=["light", "medium"])
    evaluation.set_defaults(action=_evaluation_set)

    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        options.action(options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    config = read_config(options.config)
    config = replace(config, steps=config.steps if options.steps is None else options.steps)
    check(config)
    if options.resume is None and (options.out / CHECKPOINT).exists():
        raise ValueError(
            f"{options.out / CHECKPOINT} exists: go on with --resume {options.out / CHECKPOINT}, or choose another --out"
        )
    photos = load_photos(options.photos, config.crop + 16 * config.scale)
    state = load_checkpoint(options.resume, config) if options.resume else new_state(config)
    train(state, config, photos, options.out)


def _export(options: argparse.Namespace) -> None:
    config = read_checkpoint_config(options.checkpoint)
    write_bundle(options.output, export(load_checkpoint(options.checkpoint, config), config))


def _evaluation_set(options: argparse.Namespace) -> None:
    make_evaluation_set(options.photos, options.out, options.presets)


if __name__ == "__main__":
    sys.exit(main())
