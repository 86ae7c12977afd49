"""The model that ships with the package, on crops of real photographs."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tsdsr_core.families.bundle import BUILTIN, read_bundle
from tsdsr_core.families.load import load
from tsdsr_core.images.files import read_picture
from tsdsr_core.metrics.fidelity import psnr_y, ssim_y
from tsdsr_core.pipeline import Options, bicubic, restore

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def model():
    return load("builtin", device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def options(model) -> Options:
    return Options(**model.defaults)


def stack(folder: str) -> torch.Tensor:
    return torch.cat([read_picture(path).rgb for path in sorted((DATA / folder).glob("*.png"))])


@pytest.mark.parametrize("preset", ["light", "medium"])
def test_it_beats_bicubic_enlargement(preset, model, options):
    low, high = stack(f"lq-{preset}"), stack("hq")
    assert len(low) == len(high) == 3
    restored, enlarged = restore(low, model.model(), options), bicubic(low, (256, 256))
    assert psnr_y(restored, high).mean() > psnr_y(enlarged, high).mean() + 0.2
    assert ssim_y(restored, high).mean() > ssim_y(enlarged, high).mean()


def test_it_is_small_and_says_what_it_is():
    assert BUILTIN.stat().st_size <= 12e6
    bundle = read_bundle(BUILTIN)
    assert bundle.notes["license"] == "Apache-2.0"
    heads, layers = (bundle.configs["transformer"][key] for key in ("num_attention_heads", "num_layers"))
    assert heads == layers, "ComfyUI derives both from the hidden size"
    assert bundle.configs["transformer"]["attention_head_dim"] == 64
    assert all(channels % 32 == 0 for channels in bundle.configs["vae"]["block_out_channels"])
    assert bundle.configs["vae"]["norm_num_groups"] == 32
    for key in ("encoder.mid_block.attentions.0.to_q.weight", "quant_conv.weight", "post_quant_conv.weight"):
        assert key in bundle.vae


def test_strength_zero_is_close_to_plain_enlargement(model, options):
    low = stack("lq-light")
    kept = restore(low, model.model(), dataclasses.replace(options, strength=0.0))
    assert psnr_y(kept, bicubic(low, (256, 256))).min() > 25


def test_tiles_leave_no_seams(model, options):
    """A seam is a jump that a whole row or column shares; tiled and untiled results differ by none of one 8-bit level."""
    low = stack("lq-medium")[:1].repeat(1, 1, 2, 2)
    difference = restore(low, model.model(), options) - restore(low, model.model(), dataclasses.replace(options, tile=128))
    for axis, across in ((2, 3), (3, 2)):
        jumps = difference.diff(dim=axis).mean(across).abs()
        assert jumps.max() < 1 / 255
