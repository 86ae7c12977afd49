"""Grids and sharpness: hand calculations on plain waves, and behaviour on photographs and 1/f noise."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tsdsr_core.images.files import read_picture
from tsdsr_core.metrics.spectrum import grid_peaks, sharpness

PHOTOS = sorted((Path(__file__).parents[1] / "data" / "hq").glob("*.png"))
LEVEL = 1 / 219  # one level of the luma, 16..235, as RGB in 0..1


def grey(levels: torch.Tensor) -> torch.Tensor:
    """A picture around middle grey from ``(H, W)`` levels of luma."""
    return (0.5 + levels * LEVEL)[None, None].repeat(1, 3, 1, 1).double()


def wave(side: int, period: float, phase: float = 0.0) -> torch.Tensor:
    """A cosine across, ``(side, side)``."""
    return torch.cos(2 * math.pi * torch.arange(side, dtype=torch.float64) / period + phase).expand(side, side)


def lines(height: int, width: int, period: int) -> torch.Tensor:
    """Bright lines of one 8-bit level, ``period`` apart, as RGB in 0..1."""
    grid = torch.zeros(height, width)
    grid[::period] = 1 / 255
    grid[:, ::period] = 1 / 255
    return grid


def clouds(side: int, seed: int = 0, deviation: float = 0.05) -> torch.Tensor:
    """Noise with the 1/f spectrum of photographs, 8 bits, ``(1, 3, side, side)``."""
    f = torch.fft.fftfreq(side)
    radius = torch.hypot(f[:, None], f)
    radius[0, 0] = math.inf
    noise = torch.fft.fft2(torch.randn(side, side, generator=torch.Generator().manual_seed(seed)))
    values = torch.fft.ifft2(noise / radius).real
    return eight_bits(0.5 + deviation * values / values.std()).expand(1, 3, side, side)


def eight_bits(image: torch.Tensor) -> torch.Tensor:
    return (image.clamp(0, 1) * 255).round() / 255


def blurred(image: torch.Tensor, sigma: float) -> torch.Tensor:
    reach = int(4 * sigma) + 1
    row = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * sigma**2))
    row = (row / row.sum()).repeat(3, 1, 1, 1)
    image = F.pad(image, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(image, row, groups=3), row.transpose(2, 3), groups=3)


@pytest.fixture(params=PHOTOS, ids=lambda path: path.stem)
def picture(request):
    return read_picture(request.param).rgb


@pytest.mark.parametrize("period", [8, 16])
def test_a_blank_has_no_grid(period):
    assert grid_peaks(torch.full((2, 3, 80, 100), 0.3), period).tolist() == pytest.approx([1, 1], abs=1e-9)


@pytest.mark.parametrize(("period", "amplitude"), [(8, 0.01), (16, 0.05)])
def test_a_pure_wave_equals_a_hand_calculation(period, amplitude):
    """So faint that the normalised luma is the luma less its Gaussian mean: the rest is arithmetic."""
    offsets = torch.arange(7) - 3
    row = torch.exp(-(offsets**2) / (2 * (7 / 6) ** 2))
    passed = 1 - (row / row.sum() * torch.cos(2 * math.pi * offsets / period)).sum().item()
    power = (amplitude * passed * 256 / 3) ** 2  # a^2 / 4 of (sum w)^2 / sum w^2 = 4 * 256^2 / 9 for Hann windows in 2-D
    peak = 1 + power / (1 / 12)
    odd = period // 2  # multiples of 1 / period on each axis, of which the wave fills the first and its mirror image
    expected = (2 * peak + 2 * odd - 2) / (2 * odd)
    assert grid_peaks(grey(amplitude * wave(512, period)), period).item() == pytest.approx(expected, rel=0.02)
    assert expected > 1.2


@pytest.mark.parametrize("period", [8, 16])
def test_brightness_and_direction_do_not_matter(picture, period):
    image = 0.8 * picture.double() + 0.02
    found = grid_peaks(image, period).item()
    assert grid_peaks(image + 0.1, period).item() == pytest.approx(found, rel=1e-9)
    assert grid_peaks(image.transpose(2, 3), period).item() == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("period", [8, 16])
def test_photographs_have_none_and_a_stronger_grid_shows_more(picture, period):
    grid = lines(256, 256, period)
    found = [grid_peaks(eight_bits(picture + strength * grid), period).item() for strength in (0, 1, 2, 4, 8)]
    assert 0.8 < found[0] < 1.3
    assert found == sorted(found)
    assert found[-1] > 4


@pytest.mark.parametrize("period", [8, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_one_level_shows_in_noise_like_photographs(period, seed):
    image = clouds(512, seed)
    plain = grid_peaks(image, period).item()
    assert 0.8 < plain < 1.5
    assert grid_peaks(eight_bits(image + lines(512, 512, period)), period).item() > 1.8 * plain


def test_a_pattern_of_cells_shows_too():
    image = clouds(512)
    cell = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) / 255
    assert grid_peaks(eight_bits(image + cell.repeat(32, 32)), 16).item() > 3 * grid_peaks(image, 16).item()


def test_each_period_has_its_own_figure():
    for period, other in ((8, 16), (16, 8), (4, 8), (10, 8), (10, 16)):
        assert grid_peaks(grey(3 * wave(256, period, 0.3)), other).item() == pytest.approx(1, abs=0.05), (period, other)


@pytest.mark.parametrize("size", [(64, 64), (64, 200), (101, 75), (130, 257)])
def test_any_size_from_64_pixels(size):
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    for measure in (lambda x: grid_peaks(x, 8), lambda x: grid_peaks(x, 16), sharpness):
        both = measure(image)
        assert both.shape == (2,)
        assert both.tolist() == pytest.approx([measure(image[i : i + 1]).item() for i in range(2)])


def test_what_cannot_be_measured_is_named():
    for measure in (lambda x: grid_peaks(x, 8), sharpness):
        with pytest.raises(ValueError, match="80x63 pixels is too small for its spectrum: expected at least 64x64"):
            measure(torch.rand(1, 3, 63, 80))
    with pytest.raises(ValueError, match="grid period 12: expected one of 8, 16 pixels"):
        grid_peaks(torch.rand(1, 3, 64, 64), 12)


def test_sharpness_of_two_waves_equals_a_hand_calculation():
    """Fine detail of 2 levels over coarse detail of 5: 20 log10(2 / 5)."""
    image = grey(2 * wave(128, 4, 0.1) + 5 * wave(128, 16, 0.2))
    assert sharpness(image).item() == pytest.approx(20 * math.log10(2 / 5), abs=1e-6)
    assert sharpness(image.transpose(2, 3)).item() == pytest.approx(20 * math.log10(2 / 5), abs=1e-6)


def test_sharpness_is_of_neither_brightness_nor_contrast(picture):
    image = picture.double()
    assert sharpness(0.5 * image + 0.2).item() == pytest.approx(sharpness(image).item(), abs=1e-9)


def test_sharpness_rises_from_blur_to_the_original_and_little_with_noise(picture):
    found = [sharpness(eight_bits(blurred(picture, sigma))).item() for sigma in (3, 2, 1.5, 1, 0.8, 0.6, 0.4)]
    original = sharpness(picture).item()
    assert [*found, original] == [*sorted(found), original]
    assert original - found[3] > 3
    noisy = picture + 5 / 255 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    assert 0 < sharpness(eight_bits(noisy)).item() - original < 1


def test_a_blank_has_no_sharpness():
    assert math.isnan(sharpness(torch.full((1, 3, 64, 64), 0.3)).item())
