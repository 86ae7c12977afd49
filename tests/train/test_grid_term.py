"""The training term against patterns of a model's own cells."""

import pytest
import torch

from tsdsr_core.metrics.spectrum import grid_peaks
from tsdsr_core.train.objectives.grid import periodic_error

from ..support.tiny import photo


@pytest.fixture
def image():
    return 0.4 + 0.2 * photo(160, 160, 1, batch=2)


def pattern(period: int) -> torch.Tensor:
    """About one level of 255 strong."""
    cell = 0.004 * torch.randn(1, 3, period, period, generator=torch.Generator().manual_seed(period))
    return cell.tile(1, 1, 160 // period, 160 // period)


def test_patterns_of_8_and_16_pixels_count_and_noise_hardly(image):
    noise = 0.004 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    patterns = [periodic_error(image + pattern(period), image) for period in (8, 16)]
    assert min(patterns) > 4 * periodic_error(image + noise, image)
    assert periodic_error(image + 0.1, image) < 1e-3, "a change of brightness"
    assert grid_peaks(image + pattern(8), 8).min() > 2 * grid_peaks(image, 8).max(), "the metric sees the same"


def test_the_term_is_the_rms_of_the_pattern_over_the_local_deviation():
    """On a flat image with a checkerboard of known contrast, which is its own fine part but for what a Gaussian keeps of it."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    board = torch.where((rows + columns) % 2 == 0, 1.0, -1.0) * 0.02
    image = (0.5 + board).expand(2, 3, 64, 64)
    expected = 0.02 / (0.02 + 1 / 255)
    assert periodic_error(image, torch.full_like(image, 0.5)).item() == pytest.approx(expected, rel=0.01)


def test_the_gradient_leads_away_from_the_pattern(image):
    shown = (image + pattern(8)).requires_grad_()
    before = periodic_error(shown, image)
    before.backward()
    assert periodic_error(shown.detach() - 0.001 * shown.grad / shown.grad.abs().max(), image) < before


def test_a_black_image_has_a_finite_gradient():
    image = torch.zeros(1, 3, 32, 32, requires_grad=True)
    periodic_error(image, torch.full((1, 3, 32, 32), 0.2)).backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
