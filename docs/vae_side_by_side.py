"""Decode one latent untiled, with the exact tiled VAE and with diffusers' tiling: error, time, memory, a picture of the errors.

    python docs/vae_side_by_side.py --side 512 --tile 256 --repeats 2 --picture docs/images/vae_errors.png
    python docs/vae_side_by_side.py --device cuda --dtype fp16 --side 4096 --memory 2.5

Random weights at the widths of SD3's autoencoder; each decoder runs in turn, the fastest run counts. Memory is what a run
allocates at most on a CUDA device; on the CPU, by how much the process grew, which is less once it has grown before.
``--plans`` prints what the exact one plans for larger pictures in 16 bit, without running it. Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tsdsr_core.cli.bench.benchmark import machine, synchronise
from tsdsr_core.families.sd3.config import VAE_CONFIG
from tsdsr_core.system.device import DTYPES, choose_device, choose_dtype, free_memory, free_ram, release_memory
from tsdsr_core.system.peak import peak_memory
from tsdsr_core.vae.attention import in_windows
from tsdsr_core.vae.execute import plan_and_run
from tsdsr_core.vae.plan import plan_tiles
from tsdsr_core.vae.program import decoder_program

FREE = 2.5e9


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="of the picture")
    parser.add_argument("--tile", type=int, default=256, help="side of the tiles in pixels, for both tiled decoders")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES])
    parser.add_argument("--memory", type=float, help="GB of the device that the exact one may take beside the weights")
    parser.add_argument("--window", type=int, metavar="CELLS", help="also decode with the attention limited to a window")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--plans", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(**VAE_CONFIG).eval().requires_grad_(False)
    if options.plans:
        plans(vae)
        return
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean fp32; of no effect in 16 bit
    torch.nn.Module.to(vae, device, dtype)
    latent = torch.randn(1, 16, options.side // 8, options.side // 8).to(device, dtype)

    def in_window(z: Tensor) -> Tensor:
        return exact(vae, z, None, options.memory, options.window)

    decoders: dict[str, Callable[[Tensor], Tensor]] = {
        "untiled": torch.inference_mode()(lambda z: vae.decode(z, return_dict=False)[0]),
        "exact": lambda z: exact(vae, z, None, options.memory),
        f"exact, tile {options.tile}": lambda z: exact(vae, z, options.tile, options.memory),
        **({f"window of {options.window}": in_window} if options.window else {}),
        "diffusers tiling": torch.inference_mode()(lambda z: tiled(vae, z, options.tile)),
    }
    print(f"{machine(device)}, {dtype}, {options.side}x{options.side}")
    results, seconds, peaks = {}, {name: [] for name in decoders}, {name: [] for name in decoders}
    for _ in range(options.repeats):
        for name, decode in decoders.items():
            release_memory(device)
            with peak_memory(device) as memory:
                start = time.perf_counter()
                result = decode(latent)
                synchronise(device)
                seconds[name].append(time.perf_counter() - start)
                peaks[name].append(memory.growth)
            results[name] = result.float().cpu()
            del result
    whole = results["untiled"]
    taken = "process grew by" if device.type == "cpu" else "peak"
    for name, result in results.items():
        error = (result - whole).abs()
        relative = error.max() / whole.abs().max()
        memory = "-" if None in peaks[name] else f"{max(peaks[name]) / 1e9:.2f} GB"
        print(f"{name:20} {min(seconds[name]):7.2f} s  {min(seconds[name]) / min(seconds['untiled']):5.2f} x untiled  "
              f"{taken} {memory}  "
              f"greatest error {relative:.1e}, mean {error.mean() / whole.abs().mean():.1e}")  # fmt: skip
    if options.picture:
        draw(results, whole, options.picture)


def exact(vae: Any, z: Tensor, tile: int | None, memory: float | None, window: int | None = None) -> Tensor:
    """This project's decoder; ``memory`` in GB. With a ``window`` of the attention in cells it is an estimate."""
    program = in_windows(decoder_program(vae), window)

    def free() -> int | None:
        found = free_memory(z.device)
        return found if found is None or memory is None else min(found, int(memory * 1e9))

    return plan_and_run(program, z, z.device, free, tile, free_ram, release=lambda: release_memory(z.device))


def tiled(vae: Any, z: Tensor, tile: int) -> Tensor:
    """diffusers' own tiles, which overlap by a quarter and are blended."""
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // 8
    try:
        return vae.decode(z, return_dict=False)[0]
    finally:
        vae.disable_tiling()


def draw(results: dict[str, Tensor], whole: Tensor, path: Path) -> None:
    """The untiled picture and the errors of the others, where white is a tenth of its range."""
    panels = []
    for name, result in results.items():
        shown = whole / whole.abs().max() / 2 + 0.5 if name == "untiled" else 10 * (result - whole).abs() / whole.abs().max()
        panel = Image.fromarray((shown[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).resize((384, 384))
        ImageDraw.Draw(panel).text(
            (8, 6), name, font=ImageFont.load_default(20), fill="white", stroke_width=2, stroke_fill="black"
        )
        panels.append(panel)
    sheet = Image.new("RGB", (392 * len(panels) - 8, 384), "white")
    for index, panel in enumerate(panels):
        sheet.paste(panel, (392 * index, 0))
    sheet.save(path)


def plans(vae: Any) -> None:
    """Where the maps lie and what they take, in 16 bit with 2.5 GB free on the device."""
    specs = [op.spec for op in decoder_program(vae)]
    for side in (512, 1024, 2048, 4096, 8192):
        plan = plan_tiles(specs, side // 8, side // 8, 2, int(FREE))
        print(f"{side}: maps on the {plan.maps}, keys on the {plan.keys}, device {plan.device_bytes / 1e9:.2f} GB, "
              f"host {plan.host_bytes / 1e9:.1f} GB, {plan.tiles} tiles")  # fmt: skip


if __name__ == "__main__":
    main()
