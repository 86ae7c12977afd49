"""Colours under transparency, and the enlarged alpha channel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdsr_core.alpha import enlarge_alpha, spread_colours
from tsdsr_core.pipeline import bicubic

from ..support.tiny import disc, photo

sides = st.integers(1, 40)


def seen(rgb, alpha, background):
    """The image over a plain background."""
    return rgb * alpha + background * (1 - alpha)


@given(sides, sides, st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=60)
def test_hidden_colours_become_those_of_visible_pixels(height, width, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.rand(batch, 3, height, width, generator=generator)
    alpha = (torch.rand(batch, 1, height, width, generator=generator) > 0.7).float()
    spread = spread_colours(rgb, alpha)
    for image, mask, found in zip(rgb, alpha[:, 0] == 1, spread, strict=True):
        assert torch.equal(found[:, mask], image[:, mask]), "exact where it is visible"
        if mask.any():
            visible = image[:, mask]
            assert (found >= visible.amin(1)[:, None, None] - 1e-5).all()
            assert (found <= visible.amax(1)[:, None, None] + 1e-5).all()
        else:
            assert torch.equal(found, image), "nothing to spread"


def test_nothing_depends_on_what_is_hidden_or_on_the_neighbour_in_the_batch():
    _, alpha = disc(45, soft=3)
    visible, hidden = photo(45, 45, 1), photo(45, 45, 2)
    one = spread_colours(torch.where(alpha > 0, visible, hidden), alpha)
    other = spread_colours(torch.where(alpha > 0, visible, 1 - hidden), alpha)
    assert torch.equal(one, other)
    pair = spread_colours(torch.cat((visible, hidden)), torch.cat((alpha, 1 - alpha)))
    assert torch.equal(pair[:1], spread_colours(visible, alpha))
    assert torch.equal(pair[1:], spread_colours(hidden, 1 - alpha))


def test_opaque_images_stay_as_they_are():
    image = photo(33, 20)
    assert spread_colours(image, None) is image
    assert spread_colours(image, torch.ones(1, 1, 33, 20)) is image


def test_half_transparent_pixels_keep_their_colour():
    image = photo(33, 20)
    alpha = torch.full((1, 1, 33, 20), 0.3)
    alpha[..., :10] = 0
    spread = spread_colours(image, alpha)
    assert torch.equal(spread[..., 10:], image[..., 10:])
    assert (spread[..., 9] - image[..., 10]).abs().mean() < 0.05, "what is hidden continues what is visible"


def test_the_few_digits_of_almost_transparent_colours_count_little():
    """Programs that multiply by alpha leave black or white of a colour at alpha 1/255."""
    rgb, alpha = disc(32, soft=0)
    alpha[..., 2, 2] = 1 / 255
    rgb[..., 2, 2] = 0
    assert spread_colours(rgb, alpha)[..., 2, 2].min() > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_colours_spread_in_any_type(dtype):
    rgb, alpha = disc(40, soft=2)
    spread = spread_colours(rgb.to(dtype), alpha.to(dtype))
    assert spread.dtype == dtype
    assert (spread - 1).abs().max() < 2e-3


@pytest.mark.parametrize("soft", [0, 1, 4])
@pytest.mark.parametrize("background", [0.0, 0.5, 1.0])
def test_an_enlarged_edge_has_no_fringe_over_any_background(soft, background):
    rgb, alpha = disc(40, soft)
    larger = enlarge_alpha(alpha, (160, 160))
    found = seen(bicubic(spread_colours(rgb, alpha), (160, 160)), larger, background)
    assert (found - seen(torch.ones_like(found), larger, background)).abs().max() < 1e-5
    if background == 1 and soft == 0:
        assert seen(bicubic(rgb, (160, 160)), larger, 1.0).min() < 0.8, "what it is for"


@given(sides, sides, st.floats(0.5, 6), st.integers(0, 10**6))
@settings(max_examples=60)
def test_an_enlarged_alpha_does_not_overshoot(height, width, scale, seed):
    alpha = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed)) * 0.6 + 0.2
    size = max(1, int(height * scale)), max(1, int(width * scale))
    larger = enlarge_alpha(alpha, size)
    assert larger.shape[2:] == size
    assert alpha.min() - 1e-6 <= larger.min()
    assert larger.max() <= alpha.max() + 1e-6


def test_an_enlarged_edge_of_alpha_rises_without_a_halo():
    alpha = torch.full((1, 1, 12, 12), 0.2)
    alpha[..., 6:] = 0.8
    row = enlarge_alpha(alpha, (48, 48))[0, 0, 20]
    assert (row.diff() >= 0).all()
    assert (row[0], row[-1]) == (alpha[0, 0, 0, 0], alpha[0, 0, 0, -1])
    assert (bicubic(alpha, (48, 48))[0, 0, 20].diff() < 0).any(), "what it is for"
    assert (enlarge_alpha(alpha, (48, 48)) - bicubic(alpha, (48, 48))).abs().max() < 0.12 * 0.6, (
        "bicubic, but for its overshoot"
    )
    assert enlarge_alpha(alpha, (12, 12)) is alpha
