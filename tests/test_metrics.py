"""Metrics against scikit-image, SciPy and hand calculations."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

from tsdsr_core.metrics import luma, mean, naturalness, psnr_y, ssim_y

from .tiny import photo


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
    for metric in (psnr_y, ssim_y, naturalness):
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
