"""The weighted mean of two models of one training, as a bundle: between a soft and a sharp result, or beyond (a share above 1).

    python docs/experiments/mean_of_weights.py FIRST.safetensors SECOND.safetensors 0.8 -o MEAN.safetensors

``0.8`` is the second model's share.  Both must have the same layout; the header is that of the second.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("share", type=float)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    first, second = load_file(options.first), load_file(options.second)
    if {name: value.shape for name, value in first.items()} != {name: value.shape for name, value in second.items()}:
        parser.error(f"{options.first} and {options.second} hold different models: give two of one training")
    with safe_open(options.second, "pt") as file:
        header = file.metadata()
    mean = {name: first[name].float().lerp(value.float(), options.share).to(value.dtype) for name, value in second.items()}
    save_file(mean, options.output, metadata=header)


if __name__ == "__main__":
    main()
