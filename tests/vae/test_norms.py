"""The norms of 16-bit maps on a GPU: their arithmetic on the CPU, and what a whole decode then moves, counted without data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from tsdsr_core.families.sd3.config import VAE_CONFIG
from tsdsr_core.vae import feature_map, norms
from tsdsr_core.vae.execute import plan_and_run
from tsdsr_core.vae.passes import NVIDIA
from tsdsr_core.vae.program import decoder_program

from ..pipeline.test_fake_cuda import forget
from ..support import norm_kernels
from ..support.fake_device import install
from ..support.traffic import Traffic
from .test_program import small_vae
from .test_tiled import ROUNDING, latents, mean_error, short_of_memory, tiled, untiled, worst

CPU = torch.device("cpu")
LAYOUTS = [torch.channels_last, torch.contiguous_format]


@pytest.fixture(autouse=True)
def known_kernels():
    norm_kernels.install()
    forget()
    yield
    forget()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torchs_kernels_give_the_norm_in_fp32(dtype, layout):
    assert norms._agrees(norms.TorchNorms(layout), CPU, dtype, layout)


class Lopsided(norms.TorchNorms):
    def scale_shift(self, parts, norm, weight, bias):
        return super().scale_shift(parts[:1] * len(parts), norm, weight, bias)


class Swapped(norms.TorchNorms):
    def scale_shift(self, parts, norm, weight, bias):
        return super().scale_shift(parts, norm, bias, weight)


class Turned(norms.TorchNorms):
    def apply(self, tile, scale, shift, activate):
        return super().apply(tile.flip(3), scale, shift, activate)


@pytest.mark.parametrize("faulty", [Lopsided, Swapped, Turned])
def test_another_result_is_noticed(faulty):
    """A part that does not count, weight for bias, and pixels in another order."""
    assert not norms._agrees(faulty(LAYOUTS[0]), CPU, torch.float16, LAYOUTS[0])


def test_groups_between_far_means():
    """Channels of a group whose means lie apart by more than their deviations, in parts of other sizes."""
    norm = nn.GroupNorm(2, 8, eps=1e-6)
    whole = torch.randn(1, 8, 30, 21) + 40 * torch.arange(8.0)[:, None, None]
    ours = norms.TorchNorms(LAYOUTS[0])
    parts = [part for tile in whole.half().split((4, 17), 3) for part in ours.add(tile, None, norm.eps)[1]]
    scale, shift = ours.scale_shift(parts, norm, norm.weight.half(), norm.bias.half())
    expected = norm(whole.half().double().float())
    assert (whole.half().float() * scale + shift - expected).abs().max() <= 2e-4


@pytest.mark.parametrize("size", [(9, 21), (13, 8)])
@pytest.mark.parametrize("tile", [24, 5000])
def test_decoding_in_16_bits_is_no_worse_than_untiled(monkeypatch, size, tile):
    """As ``test_16_bit_is_no_worse_than_untiled``: SiLU rounds once."""
    monkeypatch.setattr(feature_map, "norms_for", lambda device, dtype, layout: norms.TorchNorms(layout))
    vae = nn.Module.to(small_vae(8), torch.bfloat16)
    exact = nn.Module.double(nn.Module.to(small_vae(8), torch.bfloat16))
    z = latents(*size).bfloat16()
    reference = untiled(exact, z.double())
    ours, theirs = tiled(decoder_program(vae), z, tile), untiled(vae, z)
    assert mean_error(ours, reference) <= 0.95 * mean_error(theirs, reference)


class Late(norms.WideNorms):
    adds_late = True


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("tile", [None, 24])
def test_residuals_added_while_enlarging(monkeypatch, tile, short):
    """Also where memory runs out in the pass that would leave the adding to the next, or in that one."""
    vae, z = small_vae(), latents(40, 24)
    reference = untiled(vae, z)
    monkeypatch.setattr(feature_map, "norms_for", lambda *_: Late())
    if short:
        short_of_memory(vae.decoder.up_blocks[0].resnets[2].conv2, 30)
        short_of_memory(vae.decoder.up_blocks[1].upsamplers[0], 100)
    assert worst(tiled(decoder_program(vae), z, tile), reference) <= ROUNDING


def test_tritons_kernels_give_the_norm_in_fp32():
    """By Triton's interpreter, in a process of its own, since it must be chosen before the kernels are made."""
    pytest.importorskip("triton")
    code = (
        "import torch; from tsdsr_core.vae import norms; from tsdsr_core.vae.triton_norms import TritonNorms; "
        "assert norms._agrees(TritonNorms(), torch.device('cpu'), torch.float16, torch.channels_last)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"})


class CountedTriton(norms.TorchNorms):
    """What ``triton_norms`` reads and writes, where Triton is not there: each tensor of a kernel once."""

    adds_late = True

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def add(self, tile, x, eps):
        if x is not None:
            self.traffic.add("add", tile, x, tile)
        elif eps is not None:
            self.traffic.add("measure", tile)
        return tile, [] if eps is None else [tile]

    def scale_shift(self, parts, norm, weight, bias):
        scale, shift = (torch.empty(1, norm.num_channels, 1, 1, device=weight.device) for _ in range(2))
        self.traffic.add("merge", scale, shift)
        return scale, shift

    def apply(self, tile, scale, shift, activate):
        result = torch.empty_like(tile, memory_format=torch.channels_last)
        self.traffic.add("apply", tile, scale, shift, result)
        return result

    def double(self, tile, x):
        shape = 1, tile.shape[1], 2 * tile.shape[2], 2 * tile.shape[3]
        result = torch.empty(shape, dtype=tile.dtype, device=tile.device, memory_format=torch.channels_last)
        self.traffic.add("double", tile, *([] if x is None else [x]), result)
        return result


@pytest.mark.parametrize(("kind", "gigabytes", "launches"), [("torch", 42, 250), ("triton", 25, 150)])
def test_what_decoding_1024_moves(monkeypatch, kind, gigabytes, launches):
    """SD3's autoencoder in fp16 where one tile fits; with norms in fp32 it was 72.8 GB, 912 kernels, 31 uploads, 13 waits.

    Bytes and kernels of the convolutions' biases, which cuDNN adds in passes of their own, are left out here and there.
    """
    with install(monkeypatch, "cuda") as mode:
        vae = nn.Module.to(AutoencoderKL(**VAE_CONFIG), mode.device, torch.float16).eval().requires_grad_(False)
        z = torch.empty(1, 16, 128, 128, dtype=torch.float16, device=mode.device)

        def decode() -> Traffic:
            with Traffic() as traffic:
                if kind == "triton":
                    monkeypatch.setattr(feature_map, "norms_for", lambda *_: CountedTriton(traffic))
                program = decoder_program(vae)
                plan_and_run(program, z, mode.device, lambda: 24 * 10**9, None, lambda: 10**12, kernels=NVIDIA)
            return traffic

        decode()  # what is prepared once is there
        traffic = decode()
    biases = "bias of aten::conv2d"
    moved, kernels = traffic.bytes - traffic.by_name[biases], traffic.launches - traffic.launches_by_name[biases]
    print(f"{kind}: {moved / 1e9:.1f} GB, {kernels} kernels, {traffic.uploads} uploads, {traffic.waits} waits")
    assert moved <= gigabytes * 1e9
    assert kernels <= launches
    assert (traffic.uploads, traffic.waits) == (0, 0)
