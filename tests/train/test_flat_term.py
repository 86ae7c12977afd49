"""The training term against fine texture in flat areas."""

import pytest
import torch
import torch.nn.functional as F

from tsdsr_core.metrics.fidelity import flat_areas
from tsdsr_core.train.objectives.flat import flat_error

from ..support.tiny import photo


@pytest.fixture
def photograph():
    """Left half: grey with grain of one level. Right half: texture."""
    grain = torch.randn(2, 3, 96, 48, generator=torch.Generator().manual_seed(0)) / 255
    return torch.cat((0.5 + grain, photo(96, 48, 1, batch=2)), 3).clamp(0, 1)


def board(side: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.where((rows + columns) % 2 == 0, 1.0, -1.0)


def test_grain_is_flat_and_texture_is_not(photograph):
    flat = flat_areas(photograph)
    assert flat[..., :40].float().mean() > 0.99
    assert flat[..., 56:].float().mean() < 0.2


def test_a_checkerboard_in_a_flat_area_counts_with_its_strength():
    """A Gaussian of sigma 1.5 leaves nothing of waves of two pixels."""
    grey = torch.full((1, 3, 64, 64), 0.5)
    assert flat_error(grey + 0.01 * board(64), grey, grey).item() == pytest.approx(0.01, rel=1e-3)


def test_texture_and_brightness_do_not_count(photograph):
    textured = photograph.clone()
    textured[..., 72:] = textured[..., 72:].flip(-1)
    woven = photograph.clone()
    woven[..., :40] += 0.004 * board(96)[:, :40]
    weave = flat_error(woven, photograph, photograph)
    assert flat_error(textured, photograph, photograph) < 0.5 * weave
    assert flat_error(photograph + 0.1, photograph, photograph) < 1e-6


def test_the_aim_may_be_another_image(photograph):
    smooth = F.avg_pool2d(F.pad(photograph, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    assert flat_error(smooth, smooth, photograph) == 0 < flat_error(photograph, smooth, photograph)


def test_an_image_without_flat_areas_costs_nothing_and_has_a_gradient_of_zero():
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).round().requires_grad_()
    assert not flat_areas(noise.detach()).any()
    loss = flat_error(noise, torch.zeros_like(noise), noise.detach())
    loss.backward()
    assert loss == 0
    assert noise.grad is not None
    assert not noise.grad.any()
