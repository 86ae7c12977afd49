"""Runs the parts of ``tsdsr bench --gpu``, the cheap and important ones first, and leaves out what no time is left for."""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from ...errors import InputError
from ...system.atomic import reason
from ...system.device import choose_device, choose_dtype, release_memory
from . import gpu_parts as parts
from .benchmark import BUNDLE, SIZES, Contender
from .comfyui import check_comfyui, rows_in_comfyui
from .command import Trial, compare, describe, load_contenders, weights_folder
from .gpu_report import markdown

GIGABYTES = (8, 12, 16, 24)
_GROWTH = 6
"""Of the time from one side to twice as much: pixels grow by 4, the autoencoder's attention by 16."""
_IN_COMFYUI = 2048
"""Largest side that is run in ComfyUI, where it is run twice in each of three modes."""
_OTHERS = 0.25
"""Share of the time that the comparison leaves to the other parts."""
NO_TIME = "no time was left"


class Clock:
    """The time that the command may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def allows(self, expected: float = 0.0, reserve: float = 0.0) -> bool:
        """Whether ``expected`` seconds are left, beside the share ``reserve`` of all the time."""
        return time.monotonic() + expected + reserve * self.seconds < self.end


def run_gpu(options: argparse.Namespace) -> int:
    """Run ``tsdsr bench --gpu``; returns the exit code."""
    device = choose_device(options.device)
    if device.type == "cpu" and options.size != "tiny":
        raise InputError("--gpu: no GPU is available here; with --size tiny it runs small on the CPU")
    if options.memory is not None or options.compile:
        raise InputError("--memory and --compile do not go with --gpu: it measures several limits by itself, nothing compiled")
    if not options.minutes > 0:
        raise InputError(f"--minutes {options.minutes:g}: expected a number above 0, such as 9")
    if options.comfyui is not None:
        check_comfyui(options.comfyui)
        if options.work is None or options.only == "published":
            raise InputError("--comfyui needs --work FOLDER, for the weights that ComfyUI loads, and our procedure")
    clock = Clock(60 * options.minutes)
    dtype = choose_dtype(options.dtype, device)
    sides = sorted(options.outputs)
    report: dict[str, Any] = {}

    def part(name: str, work: Callable[[], Any]) -> None:
        report[name] = _part(name, work, clock)

    part("exactness", lambda: parts.exactness(SIZES[options.size].vae, min(384, sides[0]), device, dtype))
    part("attention", lambda: parts.attention_rows([side for side in sides if side <= 2048], device, dtype))
    contenders = load_contenders(options, device, dtype, None)
    report = {**describe(options, device, dtype, contenders), "minutes": options.minutes, **report}
    if len(contenders) == 2:
        part("difference", lambda: parts.difference(contenders, sides[0], device))
    part("rows", lambda: _rows(contenders, sides, options.repeats, device, clock))
    ours = [found for found in contenders if found.own is not None]
    del contenders[:]  # the published weights would count as ours below
    gc.collect()
    release_memory(device)
    while ours:
        _alone(ours.pop(), sides, device, clock, part)
    gc.collect()
    release_memory(device)  # for ComfyUI
    if options.comfyui is not None:
        bundle = weights_folder(options.work, options.size, dtype) / BUNDLE
        those = [side for side in sides if side <= _IN_COMFYUI] or sides[:1]
        part("comfyui", lambda: rows_in_comfyui(options.comfyui, bundle, those[-2:], sides[-1], device, clock.end))
    print(markdown(report))
    print(json.dumps(report))
    return 0


def _alone(
    ours: Contender, sides: list[int], device: torch.device, clock: Clock, part: Callable[[str, Callable[[], Any]], None]
) -> None:  # fmt: skip
    """The parts that need our weights alone."""
    model = ours.own
    assert model is not None
    part("profiles", lambda: parts.profiles(model, min(1024, sides[-1]), device))
    part("held", lambda: _held(ours, sides[-2:], device, clock))


def _part(name: str, work: Callable[[], Any], clock: Clock) -> Any:
    """The result of a part, or why there is none: one that fails must not cost the others, since such machines are rare."""
    if not clock.allows():
        return {"skipped": NO_TIME}
    print(f"{name} ...", file=sys.stderr)
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return {"error": reason(error)}


def _rows(
    contenders: list[Contender], sides: list[int], repeats: int, device: torch.device, clock: Clock
) -> list[parts.Row]:  # fmt: skip
    """Both procedures at each side, as long as there is time; the last sides may be run only once."""
    rows, took, last = [], 0.0, sides[0]
    for side in sides:
        once = took * _GROWTH ** math.log2(side / last)  # a round of both procedures, by the side before
        rounds = next((n for n in (repeats, 1) if clock.allows((n + 1) * once, _OTHERS)), 0)
        if not rounds:
            rows.append({"side": side, "name": "both", "skipped": NO_TIME})
            continue
        start = time.monotonic()
        rows += compare([Trial(found, side, device) for found in contenders], rounds, compiled=False)
        took, last = (time.monotonic() - start) / (rounds + 1), side
    return rows


def _held(ours: Contender, sides: list[int], device: torch.device, clock: Clock) -> list[parts.Row]:
    rows = []
    for side in sides:
        for gigabytes in GIGABYTES:
            if clock.allows():
                rows.append(parts.held(ours, side, gigabytes, device))
            else:
                rows.append({"gigabytes": gigabytes, "side": side, "skipped": NO_TIME})
    return rows
