"""Degradations of real photographs: each does what its name says."""

import pytest
import torch
import torch.nn.functional as F

from tsdsr_core.metrics.spectrum import grid_peaks
from tsdsr_core.train.data.degradations import degrade
from tsdsr_core.train.data.degradations.real_photographs import KINDS, grain, halo, jpeg, sensor, soft

from ..support.tiny import photo

GREY = torch.full((3, 256, 256), 0.5)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_valid_and_reproducible(kind, scale):
    high = photo(96, 128)[0]
    low = degrade(high, scale, kind, generator(3))
    assert low.shape == (3, 96 // scale, 128 // scale)
    assert 0 <= low.min() <= low.max() <= 1
    assert torch.equal(degrade(high, scale, kind, generator(3)), low)
    assert not torch.equal(degrade(high, scale, kind, generator(4)), low)


def deviations(fault) -> torch.Tensor:
    """Of 24 grey images, in levels."""
    return torch.stack([255 * fault(GREY, (64, 64), generator(seed)).std() for seed in range(24)])


def test_grain_has_the_strength_that_it_says():
    found = deviations(grain)
    assert 4 < found.min() < 15, "a quality of JPEG and mid-grey density take some of the least, 10"
    assert 20 < found.max() < 31


@pytest.mark.parametrize("fault", [grain, sensor])
def test_noise_is_correlated_with_its_neighbours(fault):
    """White noise has a correlation of 0; the one that makes worms has more."""
    found = []
    for seed in range(12):
        noise = fault(GREY, (64, 64), generator(seed))
        noise = noise - noise.mean((1, 2), keepdim=True)
        found.append((noise[:, :, 1:] * noise[:, :, :-1]).mean() / noise.square().mean())
    assert torch.stack(found).mean() > 0.15


def test_a_halo_overshoots_an_edge():
    edge = torch.full((3, 64, 64), 0.3)
    edge[:, :, 32:] = 0.7
    for seed in range(8):
        low = halo(edge, (64, 64), generator(seed))
        assert low.max() > 0.72 or low.min() < 0.28


def test_jpeg_leaves_its_blocks():
    ramp = torch.linspace(0.2, 0.8, 128).expand(3, 128, 128) + 0.05 * photo(128, 128)[0]
    peaks = [float(grid_peaks(jpeg(ramp.clamp(0, 1), (128, 128), generator(seed))[None], 8)) for seed in range(8)]
    assert max(peaks) > 2 * float(grid_peaks(ramp.clamp(0, 1)[None], 8))


def test_soft_images_have_nothing_as_fine_as_a_pixel():
    high = photo(128, 128)[0]
    plain = F.interpolate(high[None], (64, 64), mode="area")[0]
    for seed in range(8):
        low = soft(high, (64, 64), generator(seed))
        assert low.diff(dim=2).square().mean() < 0.9 * plain.diff(dim=2).square().mean()
