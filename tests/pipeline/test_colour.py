import pytest
import torch
from skimage import color

from tsdsr_core import colour
from tsdsr_core.colour import adain, lab, lab_to_rgb, match_colour, rgb_to_lab, wavelet

from ..support import oracle
from ..support.tiny import photo


@pytest.mark.rounding
def test_wavelet_equals_the_sum_of_detail_bands():
    content, style = photo(70, 90, 1), photo(70, 90, 2)
    assert (wavelet(content, style) - oracle.wavelet(content, style)).abs().max() <= 1e-6


@pytest.mark.parametrize("levels", [1, 3, 5])
def test_strips_give_what_the_whole_picture_gives(levels, monkeypatch):
    content, style = photo(150, 40, 1), photo(150, 40, 2)
    whole = wavelet(content, style, levels)
    monkeypatch.setattr(colour, "_CPU_STRIP", 40 * 20)
    assert (wavelet(content, style, levels) - whole).abs().max() < 1e-6


@pytest.mark.rounding
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)])
def test_wavelet_holds_for_pictures_smaller_than_its_kernel(size):
    content, style = torch.rand(1, 3, *size), torch.rand(1, 3, *size)
    assert (wavelet(content, style) - oracle.wavelet(content, style)).abs().max() <= 1e-6


@pytest.mark.parametrize("method", ["wavelet", "adain", "lab", "none"])
def test_a_picture_that_has_its_colours_already_stays(method):
    image = photo(48, 40, 3, batch=2)
    assert (match_colour(image, image, method) - image).abs().max() <= 1e-4


@pytest.mark.parametrize("method", ["wavelet", "adain", "lab"])
def test_a_constant_tint_is_removed(method):
    style = photo(64, 64, 4) * 0.5 + 0.2
    tinted = style + torch.tensor([0.1, -0.05, 0.02])[:, None, None]
    fixed = match_colour(tinted, style, method)
    assert (fixed - style).abs().mean() < 0.25 * (tinted - style).abs().mean()
    assert (fixed.mean((2, 3)) - style.mean((2, 3))).abs().max() < 0.01


def test_adain_equals_the_published_moments():
    content, style = photo(30, 40, 5), photo(20, 25, 6)
    assert torch.allclose(adain(content, style), oracle.adain(content, style), atol=1e-6)


def test_images_of_a_batch_keep_their_own_colours():
    content, style = photo(40, 40, 7, batch=3), photo(40, 40, 8, batch=3)
    for method in ("wavelet", "adain", "lab"):
        apart = torch.cat([match_colour(content[i : i + 1], style[i : i + 1], method) for i in range(3)])
        assert torch.allclose(match_colour(content, style, method), apart, atol=1e-6)


def test_lab_equals_scikit_image():
    image = photo(16, 16, 9)
    expected = torch.from_numpy(color.rgb2lab(image[0].permute(1, 2, 0).double().numpy())).permute(2, 0, 1)
    assert (rgb_to_lab(image.double())[0] - expected).abs().max() < 0.02  # scikit-image rounds its matrix
    assert (lab_to_rgb(rgb_to_lab(image)) - image).abs().max() < 1e-4


def test_lab_keeps_the_lightness_of_the_content():
    content, style = photo(32, 32, 10) * 0.4 + 0.3, photo(32, 32, 11) * 0.4 + 0.3
    moved = rgb_to_lab(lab(content, style))[:, 0] - rgb_to_lab(content)[:, 0]
    assert moved.std() < 0.02


def test_one_pixel_has_no_deviation_to_divide_by():
    content, style = torch.rand(1, 3, 1, 1), torch.rand(1, 3, 1, 1)
    assert torch.allclose(adain(content, style), style, atol=1e-6)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="'rainbow'"):
        match_colour(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4), "rainbow")


@pytest.mark.parametrize("levels", [0, -1, 11, 2.0, None])
def test_impossible_wavelet_levels_are_named(levels):
    """None would give the reference back: a picture that was not restored."""
    with pytest.raises(ValueError, match=f"wavelet levels {levels}: expected a whole number from 1 to 10"):
        match_colour(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4), "wavelet", levels)
