"""Metrics against scikit-image, SciPy and hand calculations."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from tsdsr_core.metrics.fidelity import flat_noise, grey, luma, mean, naturalness, psnr_y, ssim_y

from ..support.tiny import photo


def test_luma_is_bt601_in_studio_range():
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0]]).T[None, :, :, None]
    assert luma(corners).flatten().tolist() == pytest.approx([16, 235, 81.481])


def test_psnr_equals_a_hand_calculation():
    black, grey = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 10 / 219)
    assert psnr_y(grey, black).item() == pytest.approx(20 * math.log10(255 / 10))
    assert psnr_y(black, black).item() == math.inf


def test_ssim_equals_scikit_image():
    image, reference = photo(40, 52, 1, batch=3), photo(40, 52, 2, batch=3)
    image = (0.7 * reference + 0.3 * image).clamp(0, 1)
    for ours, x, y in zip(ssim_y(image, reference), luma(image)[:, 0].numpy(), luma(reference)[:, 0].numpy(), strict=True):
        _, full = structural_similarity(
            x, y, data_range=255, gaussian_weights=True, sigma=1.5, truncate=3.4, use_sample_covariance=False, full=True
        )
        assert ours.item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)


def test_every_image_of_a_batch_is_on_its_own():
    image, reference = photo(24, 24, 1, batch=2), photo(24, 24, 2, batch=2)
    for metric in (psnr_y, ssim_y, naturalness):
        both = metric(image, reference)
        assert both.tolist() == pytest.approx([metric(image[i : i + 1], reference[i : i + 1]).item() for i in range(2)])


def test_sizes_must_agree():
    for metric in (psnr_y, ssim_y, naturalness, flat_noise):
        with pytest.raises(ValueError, match="sizes differ"):
            metric(photo(24, 24), photo(24, 23))


def test_mean():
    assert mean([1.0, 2.0]) == 1.5
    assert np.isnan(mean([]))


def test_naturalness_equals_a_second_calculation():
    image, reference = photo(40, 52, 1), photo(40, 52, 2)

    def shares(picture):
        values = luma(picture)[0, 0].numpy()
        smooth = {"sigma": 7 / 6, "mode": "mirror", "radius": 3}
        average = gaussian_filter(values, **smooth)
        deviation = np.sqrt(np.maximum(gaussian_filter(values**2, **smooth) - average**2, 0))
        counts, _ = np.histogram((values - average) / (deviation + 1), bins=80, range=(-4, 4))
        return (counts + 1) / (counts + 1).sum()

    p, q = shares(image), shares(reference)
    assert naturalness(image, reference).item() == pytest.approx((p * np.log(p / q)).sum(), rel=0.02)
    assert naturalness(image, image).item() == 0


def test_naturalness_grows_with_blur_and_with_noise():
    generator = torch.Generator().manual_seed(0)
    reference = (photo(128, 128) + 0.05 * torch.randn(1, 3, 128, 128, generator=generator)).clamp(0, 1)
    noise = torch.randn(1, 3, 128, 128, generator=generator)
    blurred = [reference, *(torch.nn.functional.avg_pool2d(reference, side, 1, side // 2) for side in (3, 5, 7))]
    flat = photo(128, 128)
    for changed, original in ((blurred, reference), ([flat + level * noise / 255 for level in (0, 2, 5, 10)], flat)):
        found = [naturalness(image.clamp(0, 1), original).item() for image in changed]
        assert found == sorted(found)
        assert found[0] == 0
        assert found[-1] > 0.1


def levels(values: torch.Tensor) -> torch.Tensor:
    """A grey picture ``(1, 3, H, W)`` of levels ``(H, W)`` in 0..255."""
    return (values / 255).expand(1, 3, *values.shape)


def gaussian_response(sigma: float, period: float) -> float:
    """Share of a wave that a Gaussian of four sigmas' reach passes."""
    x = torch.arange(-round(4 * sigma), round(4 * sigma) + 1, dtype=torch.float64)
    weights = torch.exp(-(x**2) / (2 * sigma**2))
    return ((weights * torch.cos(2 * math.pi * x / period)).sum() / weights.sum()).item()


def test_grey_is_bt601_in_full_range():
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0]]).T[None, :, :, None]
    assert grey(corners).flatten().tolist() == pytest.approx([0, 255, 0.299 * 255, 0.587 * 255], abs=0.02)


@pytest.mark.parametrize("period", [3, 6, 12, 24, 48])
def test_flat_noise_equals_a_hand_calculation(period):
    """A wave on a flat reference; borders are reflected, so that a whole number of halves of it goes on for ever."""
    wave = 10 * torch.cos(2 * math.pi * torch.arange(49, dtype=torch.float64) / period)
    image, reference = levels((128 + wave).expand(40, 49)), levels(torch.full((40, 49), 128.0, dtype=torch.float64))
    expected = (1 - gaussian_response(6, period)) * wave.square().mean().sqrt().item()
    assert flat_noise(image, reference).item() == pytest.approx(expected, rel=1e-6)
    assert flat_noise(reference, reference).item() == pytest.approx(0, abs=1e-9)
    assert gaussian_response(6, 17) == pytest.approx(0.085, abs=0.005)
    assert gaussian_response(6, 32) == pytest.approx(0.5, abs=0.005)


def test_flat_noise_counts_where_the_reference_is_flat_alone():
    """Left flat, with grain that the Gaussian evens out; right stripes that it leaves, where noise does not count."""
    across = torch.arange(192)
    stripes = torch.where(across < 144, 100.0, 60 + 80.0 * (across // 3 % 2)).expand(48, 192)
    grain = 6.0 * torch.where((across + torch.arange(48)[:, None]) % 2 == 0, 1, -1)
    reference = levels(stripes + grain)
    left = 3.0 * torch.where((across + torch.arange(48)[:, None]) % 2 == 0, 1, -1) * (across < 120)
    right = 50.0 * torch.randn(48, 192, generator=torch.Generator().manual_seed(0)) * (across > 156)
    assert flat_noise(reference, reference).item() == pytest.approx(6, abs=0.05), "a checkerboard passes whole"
    assert flat_noise(levels(stripes), reference).item() == pytest.approx(0, abs=0.4)
    assert flat_noise(levels(stripes + left + right), reference).item() == pytest.approx(3 * math.sqrt(120 / 138), abs=0.15)


def test_flat_noise_has_no_figure_where_nothing_is_flat():
    stripes = levels(100 + 80.0 * (torch.arange(64) // 6 % 2).expand(64, 64))
    assert flat_noise(stripes, stripes).isnan().all()


def test_flat_noise_of_every_image_of_a_batch_is_its_own():
    reference = 0.5 + photo(64, 64, 1, batch=3) / 20
    image = reference + torch.tensor([0.01, 0.02, 0.03])[:, None, None, None] * torch.rand(3, 3, 64, 64)
    both = flat_noise(image, reference)
    assert both.tolist() == pytest.approx([flat_noise(image[i : i + 1], reference[i : i + 1]).item() for i in range(3)])
    assert both.diff().min() > 0
