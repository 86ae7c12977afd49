import math

import pytest
import torch

from tsdsr_core.train.data.degradations import PRESETS, degrade, kernels
from tsdsr_core.train.data.degradations.operations import compress_jpeg
from tsdsr_core.train.data.degradations.real_esrgan import poisson

from ..support.tiny import photo


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("preset", PRESETS)
def test_results_are_small_valid_reproducible_pictures(preset):
    high = photo(96, 128)[0]
    low = degrade(high, 4, preset, generator(3))
    assert low.shape == (3, 24, 32)
    assert low.min() >= 0
    assert low.max() <= 1
    assert torch.equal(degrade(high, 4, preset, generator(3)), low)
    assert not torch.equal(degrade(high, 4, preset, generator(4)), low)
    assert ((low * 255) - (low * 255).round()).abs().max() < 1e-3, "8 bits"


def test_presets_are_ordered_by_damage():
    high = torch.cat([photo(128, 128, seed) for seed in range(24)])
    clean = torch.nn.functional.interpolate(high, scale_factor=0.25, mode="area")

    def error(preset):
        return sum(
            (degrade(h, 4, preset, generator(i)) - c).abs().mean().item()
            for i, (h, c) in enumerate(zip(high, clean, strict=True))
        )

    light, medium, heavy = error("light"), error("medium"), error("heavy")
    assert light < medium < heavy


def test_every_kernel_sums_to_one_and_is_symmetric():
    for kernel in (
        kernels.gaussian(11, 1.7),
        kernels.gaussian(11, 1.7, 0.6, 0.4),
        kernels.generalised_gaussian(13, 0.7, 1.5, 2.0, 1.0),
        kernels.plateau(9, 1.4, 1.1),
        kernels.sinc(15, math.pi / 2),
    ):
        assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
        assert torch.allclose(kernel, kernel.flip(0, 1), atol=1e-7)


def test_kernels_equal_hand_calculations():
    gauss = kernels.gaussian(3, 1.0)
    assert gauss[1, 1] / gauss[0, 1] == pytest.approx(math.exp(0.5), rel=1e-5)
    assert gauss[1, 1] / gauss[0, 0] == pytest.approx(math.e, rel=1e-5)
    assert torch.allclose(kernels.generalised_gaussian(5, 1.0, 1.3), kernels.gaussian(5, 1.3))
    flat = kernels.plateau(3, 2.0, 1.0)
    assert flat[1, 1] / flat[0, 1] == pytest.approx(2, rel=1e-5)
    rotated = kernels.gaussian(9, 2.0, 0.7, math.pi / 2)
    assert torch.allclose(rotated, kernels.gaussian(9, 0.7, 2.0), atol=1e-6)


def test_the_sinc_filter_is_a_low_pass_with_its_cutoff():
    kernel = kernels.sinc(21, math.pi / 2)
    response = torch.fft.fft2(kernel, (64, 64)).abs()[0]  # along one axis; index 32 is pi
    assert response[:10].min() > 0.85
    assert response[24:33].max() < 0.15


def test_noise_has_the_wanted_deviation():
    import dataclasses

    from tsdsr_core.train.data.degradations.real_esrgan import _noise

    stage = dataclasses.replace(PRESETS["light"].stages[0], noise_sigma=(10.0, 10.0), grey_noise_probability=0.0)
    grey = torch.full((3, 200, 200), 0.5)
    noisy = _noise(grey, stage, generator(0))
    assert (noisy - grey).std().item() * 255 == pytest.approx(10, rel=0.03)
    same = _noise(grey, dataclasses.replace(stage, grey_noise_probability=1.0), generator(0))
    assert torch.equal(same[0], same[1])
    photons = dataclasses.replace(stage, gaussian_noise_probability=0.0, poisson_scale=(1.0, 1.0), grey_noise_probability=0.0)
    ramp = (torch.arange(256) / 255).expand(3, 400, 256)
    noise = _noise(ramp, photons, generator(1)) - ramp
    dark, bright = noise[:, :, 20:30].std(), noise[:, :, 95:105].std()
    assert bright / dark == pytest.approx(2, rel=0.1), "the variance of photons grows with their number"


def test_jpeg_damages_more_at_lower_quality():
    image = photo(64, 64)[0]
    errors = [(compress_jpeg(image, quality) - image).abs().mean().item() for quality in (95, 60, 20)]
    assert errors[0] < errors[1] < errors[2]


def test_poisson_counts_have_their_distribution():
    for levels, value in ((1, 255), (16, 3), (16, 128), (256, 1), (256, 255)):
        mean = levels * value / 255
        counts = poisson(torch.full((500, 400), value), levels, generator(levels + value))
        assert counts.mean().item() == pytest.approx(mean, rel=0.02)
        assert counts.var().item() == pytest.approx(mean, rel=0.02)
        assert (counts == 0).float().mean().item() == pytest.approx(math.exp(-mean), abs=4e-3)
    assert not poisson(torch.zeros(100, 100, dtype=torch.int64), 256, generator(0)).any()


def test_a_pixel_has_no_part_in_the_noise_of_others():
    values = torch.full((3, 20, 20), 77)
    other = values.clone()
    other[1, 4, 5] = 78
    one, two = generator(0), generator(0)
    changed = poisson(values, 256, one) != poisson(other, 256, two)
    changed[1, 4, 5] = False
    assert not changed.any()
    assert torch.equal(one.get_state(), two.get_state())
