"""Results against the published procedure on diffusers and unmerged PEFT adapters."""

import numpy as np
import pytest
import torch

from tsdsr_core import official
from tsdsr_core.families.load import load
from tsdsr_core.families.restorer import Restorer
from tsdsr_core.pipeline import RECIPES, Options, restore, restored_images, stages_of
from tsdsr_core.weights.lora import load_lora
from tsdsr_core.weights.prompt import load_prompt

from ..support import oracle
from ..support.tiny import Published, photo

CASES = {  # name: (height, width) of the input, scale
    "untiled": ((128, 128), 4),
    "tiled": ((128, 180), 4),
    "odd latents": ((131, 150), 4),
    "small": ((40, 61), 4),
    "x2": ((256, 280), 2),
    "x1": ((515, 519), 1),
}


@pytest.fixture(scope="module")
def model(published: Published) -> Restorer:
    loras = load_lora(published.loras / "transformer.safetensors"), load_lora(published.loras / "vae.safetensors")
    prompt = load_prompt(published.embeddings)
    return load(published.sd3, loras=loras, prompt=prompt, device=torch.device("cpu"), dtype=torch.float32)


@pytest.mark.rounding
@pytest.mark.parametrize("case", CASES)
def test_float_pixels_equal_the_published_arithmetic(case: str, published: Published, model: Restorer):
    (height, width), scale = CASES[case]
    low = photo(height, width)
    size = RECIPES["official"].sizes((height, width), scale, 16, 512)
    assert size.work == oracle.work_size(width, height, scale)
    stages = stages_of(model.model(), Options(scale=scale, recipe="official", tile_batch=3))
    (ours,) = restored_images(low, size, stages, RECIPES["official"].enlarge)
    expected = oracle.restore_float(published, low, size.work)
    assert expected.std() > 0.05, "a flat picture would prove nothing"
    assert (ours - expected).abs().max() <= 2e-4, "kernels give up to 3e-5, another window of the tiles 7e-3"


@pytest.mark.rounding
@pytest.mark.parametrize(("case", "fix"), [*((case, "wavelet") for case in CASES), ("untiled", "adain"), ("small", "none")])
def test_pictures_equal_the_published_ones_to_one_level(case: str, fix: str, published: Published, model: Restorer):
    (height, width), scale = CASES[case]
    low = photo(height, width)
    if fix == "adain":  # it multiplies by the ratio of contrasts: above 1, one level of difference would grow
        low = ((0.4 + 0.1 * low) * 255).round() / 255
    ours = restore(low, model.model(), Options(scale=scale, recipe="official", colour_fix=fix))
    picture = (ours[0] * 255).round().byte().permute(1, 2, 0).numpy()
    expected = oracle.restore_picture(published, low, scale, fix)
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(int) - expected).max() <= 1


@pytest.mark.rounding
def test_the_default_recipe_equals_the_published_one_where_neither_pads_nor_tiles(published: Published, model: Restorer):
    low = photo(128, 128)
    ours = restore(low, model.model(), Options())
    expected = oracle.wavelet(oracle.restore_float(published, low, (512, 512)), _enlarged(low)).clamp(0, 1)
    assert (ours - expected).abs().max() <= 1e-4


def test_the_loras_matter(published: Published, model: Restorer):
    low = photo(64, 64)
    options = Options(process_size=0)
    with_loras = restore(low, model.model(), options)
    base = load(
        published.sd3, loras=(), prompt=load_prompt(published.embeddings), device=torch.device("cpu"), dtype=torch.float32
    )
    assert (with_loras - restore(low, base.model(), options)).abs().max() > 0.01


def test_eight_bit_levels_survive_the_truncation():
    levels = torch.arange(256) / 255
    assert torch.equal(official._floor_to_8_bit(levels), levels)


def _enlarged(low: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(low, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 1)
