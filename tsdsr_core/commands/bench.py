"""measure time and memory against the published procedure, on random weights in the published layout"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..bench import (
    SCALE,
    SIZES,
    STAGES,
    Contender,
    ceiling,
    count_flops,
    load_official,
    load_ours,
    machine,
    run_once,
    write_files,
)
from ..device import choose_device, choose_dtype
from .model_options import add_device_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr bench``."""
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model; sd3-medium needs 16 GB of disk and memory")
    parser.add_argument("--outputs", type=int, nargs="+", default=[512, 1024], metavar="SIDE", help="sides of the results")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn; the median counts")
    parser.add_argument("--only", choices=("both", "ours", "published"), default="both", help="what to run")
    parser.add_argument("--compile", action="store_true", help="run our transformer through torch.compile")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="keep only N of the prompt's tokens in ours")
    parser.add_argument("--work", type=Path, help="folder for the random weights, kept and used again")
    add_device_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr bench``; returns the exit code."""
    wrong = [side for side in options.outputs if side < 64 or side % (16 * SCALE)]
    if wrong or options.repeats < 1:
        raise ValueError(
            f"--outputs {wrong}, --repeats {options.repeats}: expected sides in multiples of 64, and at least 1 run"
        )
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)) / f"{options.size}-{str(dtype).removeprefix('torch.')}"
        if not (folder / "ours.safetensors").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_files(folder, SIZES[options.size], dtype)
        contenders = _load(folder, device, dtype, options)
    rows = [row for side in options.outputs for row in _compare(contenders, side, device, options.repeats)]
    report = {
        "machine": machine(device), "device": str(device), "dtype": str(dtype), "size": options.size,
        "repeats": options.repeats,
        "ceiling_flops": ceiling(device, dtype), "rows": rows,
        "weights": {found.name: found.weights for found in contenders},
        "load_seconds": {found.name: found.load_seconds for found in contenders},
    }  # fmt: skip
    _print(report)
    print(json.dumps(report))
    return 0


def _load(folder: Path, device: torch.device, dtype: torch.dtype, options: argparse.Namespace) -> list[Contender]:
    found = []
    if options.only != "ours":
        found.append(load_official(folder, device, dtype))
    if options.only != "published":
        found.append(load_ours(folder, device, dtype, options.compile, options.prompt_tokens))
    return found


def _compare(contenders: list[Contender], side: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Run each in turn, so that what else the machine does meets both alike; the first round only warms up."""
    flops = {found.name: count_flops(found, side, device) for found in contenders}
    runs: dict[str, list[Any]] = {found.name: [] for found in contenders}
    for _ in range(repeats):
        for found in contenders:
            runs[found.name].append(run_once(found, side, device))
            print(f"{side}: {found.name} {runs[found.name][-1].total:.2f} s", file=sys.stderr)
    rows = []
    for name, results in runs.items():
        seconds = {stage: statistics.median(run.seconds[stage] for run in results) for stage in STAGES}
        total = statistics.median(run.total for run in results)
        rows.append({
            "side": side, "name": name, "seconds": total, "stages": seconds, "flops": flops[name],
            "flops_per_second": flops[name] / total, "megapixels_per_second": side**2 / 1e6 / total,
            "peak_bytes": max(run.peak_bytes for run in results),
        })  # fmt: skip
    return rows


def _print(report: dict[str, Any]) -> None:
    print(f"{report['machine']}, {report['size']}, {report['dtype']}, median of {report['repeats']}")
    for name, weights in report["weights"].items():
        print(f"{name}: weights {weights / 1e9:.2f} GB, loaded in {report['load_seconds'][name]:.1f} s")
    print(f"matrix product: {report['ceiling_flops'] / 1e12:.2f} TFLOP/s")
    head = ["side", "", "seconds", *STAGES, "MP/s", "peak GB", "TFLOP", "of ceiling"]
    print("  ".join(f"{name:>10}" for name in head))
    for row in report["rows"]:
        cells = [row["side"], row["name"], f"{row['seconds']:.2f}", *(f"{row['stages'][stage]:.2f}" for stage in STAGES),
                 f"{row['megapixels_per_second']:.3f}", f"{row['peak_bytes'] / 1e9:.2f}", f"{row['flops'] / 1e12:.2f}",
                 f"{row['flops_per_second'] / report['ceiling_flops']:.0%}"]  # fmt: skip
        print("  ".join(f"{cell:>10}" for cell in cells))
    totals = {(row["side"], row["name"]): row["seconds"] for row in report["rows"]}
    for side in sorted({row["side"] for row in report["rows"]}):
        if (side, "ours") in totals and (side, "published") in totals:
            print(f"{side}: {totals[side, 'ours'] / totals[side, 'published']:.2f} of the published procedure's time")
