"""``tsdsr bench``: its options, loading both procedures, and their comparison."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...errors import InputError
from ...system.atomic import reason
from ...system.device import choose_device, choose_dtype, held_memory, release_memory
from ...system.memory import is_out_of_memory
from ..arguments import add_device_arguments, add_memory_argument, limit_memory, memory_limit
from .benchmark import (
    BUNDLE,
    SCALE,
    SIZES,
    STAGE_NAMES,
    Contender,
    Timing,
    ceiling,
    count_flops,
    load_ours,
    load_published,
    machine,
    run_once,
    write_random_weights,
)

Result = TypeVar("Result")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tsdsr bench``."""
    parser.add_argument("--gpu", action="store_true", help="run all GPU measurements, and write tables")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for --gpu; what does not fit into it is left out")
    parser.add_argument(
        "--size", choices=SIZES, default=argparse.SUPPRESS,
        help="model size; sd3-medium needs 16 GB of disk and memory (default: tiny, with --gpu sd3-medium)",
    )  # fmt: skip
    parser.add_argument(
        "--outputs", type=int, nargs="+", default=argparse.SUPPRESS, metavar="SIDE",
        help="sides of the results in pixels (default: 512 1024, with --gpu also 2048 and 4096)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, taking turns; the median counts")
    parser.add_argument("--only", choices=("both", "ours", "published"), default="both", help="which procedures to run")
    parser.add_argument("--compile", action="store_true", help="run our transformer with torch.compile")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="keep only N prompt tokens in our procedure")
    parser.add_argument("--comfyui", type=Path, metavar="FOLDER", help="with --gpu and --work: run in this ComfyUI too")
    parser.add_argument("--work", type=Path, help="folder for the random weights, kept for the next run")
    add_device_arguments(parser)
    add_memory_argument(parser)


@dataclass
class Trial:
    """One procedure at one image size."""

    contender: Contender
    side: int
    device: torch.device
    flops: int = 0
    runs: list[Timing] = field(default_factory=list)
    error: str | None = None
    """The out-of-memory error, if it does not fit into memory."""

    def _attempt(self, work: Callable[[Contender, int, torch.device], Result]) -> Result | None:
        """The result of ``work``; None if memory runs out now or did so before."""
        if self.error is not None:
            return None
        try:
            return work(self.contender, self.side, self.device)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not is_out_of_memory(error):
                raise
            self.error = reason(error)
        release_memory(self.device)  # here, where the error no longer holds tensors
        return None

    def count(self) -> None:
        """Count the operations; this also warms up."""
        self.flops = self._attempt(count_flops) or 0

    def warm(self) -> None:
        """Run once without measuring."""
        self._attempt(run_once)

    def time(self) -> None:
        """Run once, measure and print the time."""
        found = self._attempt(run_once)
        if found is not None:
            self.runs.append(found)
            print(f"{self.side}: {self.contender.name} {found.total:.2f} s", file=sys.stderr)

    def row(self) -> dict[str, Any]:
        """The row of the report: medians, or the out-of-memory error."""
        named = {"side": self.side, "name": self.contender.name}
        if self.error is not None:
            return {**named, "error": self.error}
        total = statistics.median(run.total for run in self.runs)
        peaks = [run.peak_bytes for run in self.runs if run.peak_bytes is not None]
        return {
            **named, "seconds": total,
            "stages": {stage: statistics.median(run.seconds[stage] for run in self.runs) for stage in STAGE_NAMES},
            "flops": self.flops, "flops_per_second": self.flops / total,
            "megapixels_per_second": self.side**2 / 1e6 / total, "peak_bytes": max(peaks, default=None),
        }  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Run ``tsdsr bench``; returns the exit code."""
    options.size = getattr(options, "size", "sd3-medium" if options.gpu else "tiny")
    options.outputs = getattr(options, "outputs", [512, 1024, 2048, 4096] if options.gpu else [512, 1024])
    wrong = [side for side in options.outputs if side < 64 or side % (16 * SCALE)]
    if wrong or options.repeats < 1:
        raise InputError(
            f"--outputs {wrong}, --repeats {options.repeats}: expected sides that are multiples of 64, and at least 1 repeat"
        )
    if options.comfyui is not None and not options.gpu:
        raise InputError("--comfyui goes with --gpu")
    if options.gpu:
        from .gpu import run_gpu  # here, since it builds on this module

        return run_gpu(options)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    contenders = load_contenders(options, device, dtype, memory_limit(options, device))
    report = describe(options, device, dtype, contenders)
    _print_head(report)
    report["rows"] = []
    for side in options.outputs:
        rows = compare([Trial(found, side, device) for found in contenders], options.repeats, options.compile)
        _print_rows(rows, report["ceiling_flops"])
        report["rows"] += rows
    print(json.dumps(report))
    return 0


def load_contenders(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype, limit: int | None
) -> list[Contender]:  # fmt: skip
    """Load the chosen procedures, from random weights that are made where ``--work`` does not hold them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = weights_folder(options.work or Path(temporary), options.size, dtype)
        if not (folder / BUNDLE).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_random_weights(folder, SIZES[options.size], dtype)
        return _load(folder, device, dtype, options, limit)


def weights_folder(work: Path, size: str, dtype: torch.dtype) -> Path:
    """The folder of the random weights of a size and type in the folder ``work``."""
    return work / f"{size}-{str(dtype).removeprefix('torch.')}"


def describe(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype, contenders: list[Contender]
) -> dict[str, Any]:  # fmt: skip
    """The head of the report: what runs where."""
    return {
        "machine": machine(device), "device": str(device), "dtype": str(dtype), "size": options.size,
        "repeats": options.repeats, "ceiling_flops": ceiling(device, dtype),
        "weights": {found.name: found.weights for found in contenders},
        "load_seconds": {found.name: found.load_seconds for found in contenders},
    }  # fmt: skip


def _load(
    folder: Path, device: torch.device, dtype: torch.dtype, options: argparse.Namespace, limit: int | None
) -> list[Contender]:  # fmt: skip
    """Load the chosen procedures; ours is limited to ``limit`` bytes, not counting the other one's weights."""
    found = []
    if options.only != "ours":
        found.append(load_published(folder, device, dtype))
    if options.only != "published":
        beside = 0 if limit is None else held_memory(device)
        ours = load_ours(folder, device, dtype, options.prompt_tokens)
        if ours.own is not None:
            limit_memory(ours.own, limit, beside)
        found.append(ours)
    return found


def compare(trials: list[Trial], repeats: int, compiled: bool) -> list[dict[str, Any]]:
    """Run the trials in turn, so that other load on the machine affects all alike; the first round is a warm-up."""
    own = [trial.contender.own for trial in trials if trial.contender.own is not None]
    for model in own:
        model.compiled = None
    for trial in trials:
        trial.count()
    if compiled:
        for model in own:
            model.compile()
        for trial in trials:
            trial.warm()
    for _ in range(repeats):
        for trial in trials:
            trial.time()
    return [trial.row() for trial in trials]


def _print_head(report: dict[str, Any]) -> None:
    print(f"{report['machine']}, {report['size']}, {report['dtype']}, median of {report['repeats']}")
    for name, weights in report["weights"].items():
        print(f"{name}: weights {weights / 1e9:.2f} GB, loaded in {report['load_seconds'][name]:.1f} s")
    print(f"matrix product: {report['ceiling_flops'] / 1e12:.2f} TFLOP/s")
    _print_line(["side", "", "seconds", *STAGE_NAMES, "MP/s", "peak GB", "TFLOP", "of ceiling"])


def _print_rows(rows: list[dict[str, Any]], ceiling_flops: float) -> None:
    """Print the rows of one image size."""
    for row in rows:
        if "error" in row:
            print(f"{row['side']:>10}  {row['name']:>10}  does not fit: {row['error']}", flush=True)
            continue
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        _print_line([
            row["side"], row["name"], f"{row['seconds']:.2f}", *(f"{row['stages'][stage]:.2f}" for stage in STAGE_NAMES),
            f"{row['megapixels_per_second']:.3f}", peak, f"{row['flops'] / 1e12:.2f}",
            f"{row['flops_per_second'] / ceiling_flops:.0%}",
        ])  # fmt: skip
    seconds = {row["name"]: row["seconds"] for row in rows if "error" not in row}
    if len(seconds) == 2:
        print(
            f"{rows[0]['side']}: {seconds['ours'] / seconds['published']:.2f} times the published procedure's time", flush=True
        )


def _print_line(cells: list[Any]) -> None:
    print("  ".join(f"{cell:>10}" for cell in cells), flush=True)
