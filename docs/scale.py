"""Prints what a result of each size costs with SD3 medium: operations of the stages, and where the VAE's maps lie.

Nothing is computed: the real code runs without data, on torch's meta device, and its operations are counted.
``--window CELLS`` limits the VAE's attention, as ``tsdsr upscale --vae-attention-window``. Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from tsdsr_core import Options
from tsdsr_core.families.sd3 import PROMPT_TOKENS
from tsdsr_core.families.sd3.config import POOLED_SHAPE, TOKENS_SHAPE, TRANSFORMER_CONFIG, VAE_CONFIG
from tsdsr_core.families.sd3.fold import fold_structure
from tsdsr_core.tiles.memory import TileMemory
from tsdsr_core.vae.attention import in_windows
from tsdsr_core.vae.execute import run
from tsdsr_core.vae.plan import Plan, plan_tiles
from tsdsr_core.vae.program import Program, decoder_program, encoder_program

FACTOR = 8
META = torch.device("meta")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384], help="of square results")
    parser.add_argument("--memory", type=float, default=20, help="GB free on the device for maps and tiles")
    parser.add_argument("--window", type=int, metavar="CELLS", help="of the VAE's attention; without it, exact")
    options = parser.parse_args()
    with META:
        vae: Any = AutoencoderKL(**VAE_CONFIG).eval().requires_grad_(False)
        transformer: Any = SD3Transformer2DModel(**TRANSFORMER_CONFIG).eval().requires_grad_(False)
    fold_structure(transformer)
    halves = [in_windows(program(vae), options.window) for program in (encoder_program, decoder_program)]
    columns = "side", "tiles", "step, TFLOP", "VAE but attention", "VAE's attention", "VAE, of all", "maps", "device", "host"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for side in options.sides:
        tiles, step = step_cost(transformer, side)
        plans, flops = zip(*(half_cost(half, side, options.memory) for half in halves), strict=True)
        attention = sum(part for part, _ in flops)
        rest = sum(whole for _, whole in flops) - attention
        share = (attention + rest) / (attention + rest + step)
        decoder = plans[1]
        print(f"| {side} | {tiles} | {step / 1e12:.1f} | {rest / 1e12:.1f} | {attention / 1e12:.1f} | {share:.0%} "
              f"| {decoder.maps} | {decoder.device_bytes / 1e9:.1f} GB | {decoder.host_bytes / 1e9:.1f} GB |")  # fmt: skip


def step_cost(transformer: Any, side: int) -> tuple[int, int]:
    """Number of tiles of the step for a result of ``side`` pixels, and operations of all."""
    plan = Options().tiling(2, None, PROMPT_TOKENS, TileMemory()).plan(side // FACTOR, side // FACTOR)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        transformer(
            torch.empty(1, 16, plan.tile_height, plan.tile_width, device=META), torch.empty(TOKENS_SHAPE, device=META),
            torch.empty(POOLED_SHAPE, device=META), torch.empty(1, device=META), return_dict=False,
        )  # fmt: skip
    return len(plan), len(plan) * counter.get_total_flops()


def half_cost(program: Program, side: int, memory: float) -> tuple[Plan, tuple[int, int]]:
    """The plan of a half of the VAE in 16 bit, and operations: those of attention, and all.

    Args:
        memory: GB free on the device.
    """
    latent = program[0].spec.in_channels != 3
    length = side // FACTOR if latent else side
    plan = plan_tiles([op.spec for op in program], length, length, 2, int(memory * 1e9))
    x = torch.empty(1, program[0].spec.in_channels, length, length, device=META)
    with FlopCounterMode(display=False) as counter:
        run(program, x, replace(plan, maps="device", keys="device"), META)  # else maps would be real memory
    by_operator = counter.get_flop_counts()["Global"]
    products = sum(flops for operator, flops in by_operator.items() if "bmm" in str(operator) or "attention" in str(operator))
    return plan, (products, counter.get_total_flops())


if __name__ == "__main__":
    main()
