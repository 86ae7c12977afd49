import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsdsr_core.tiles.plan import Tiling, choose_tiling, even_tiles, max_overlap, needs_tiles, official_tiles

PUBLISHED = Tiling(64, 8, 2)
even = st.integers(1, 200).map(lambda n: 2 * n)


@pytest.mark.parametrize(
    ("height", "width", "tops", "lefts", "tile"),
    [
        (64, 64, (0,), (0,), (64, 64)),
        (32, 128, (0,), (0,), (32, 128)),  # as large as one tile: not cut
        (66, 64, (0, 2), (0,), (64, 64)),
        (40, 200, (0,), (0, 44, 90, 136), (40, 64)),
        (128, 128, (0, 32, 64), (0, 32, 64), (64, 64)),
        (120, 176, (0, 56), (0, 56, 112), (64, 64)),  # what a stride of 56 fits exactly
    ],
)
def test_even_tiles(height, width, tops, lefts, tile):
    plan = even_tiles(height, width, PUBLISHED)
    assert (plan.tops, plan.lefts, (plan.tile_height, plan.tile_width)) == (tops, lefts, tile)
    assert len(plan) == len(plan.positions) == len(tops) * len(lefts)


@pytest.mark.parametrize(
    ("height", "width", "tops", "lefts", "tile"),
    [
        (64, 64, (0,), (0,), 64),
        (65, 65, (0, 1), (0, 1), 64),  # the published grid overlaps these by 63
        (64, 128, (0,), (0, 56, 64), 64),
        (120, 176, (0, 56), (0, 56, 112), 64),
        (40, 200, (0,), (0, 32, 64, 96, 128, 160), 40),
    ],
)
def test_official_tiles(height, width, tops, lefts, tile):
    plan = official_tiles(height, width, PUBLISHED)
    assert (plan.tops, plan.lefts, plan.tile_height, plan.tile_width) == (tops, lefts, tile, tile)


def test_official_tiles_refuse_what_cuts_patches():
    with pytest.raises(ValueError, match="63x63 latent cells"):
        official_tiles(63, 80, PUBLISHED)


@pytest.mark.parametrize(
    ("height", "width", "tops", "lefts", "tile"),
    [
        (64, 64, (0,), (0,), (64, 64)),
        (72, 80, (0,), (0,), (72, 80)),  # one tile, a little larger
        (96, 96, (0, 32), (0, 32), (64, 64)),  # no larger tile saves one
        (128, 128, (0, 60), (0, 60), (68, 68)),  # 4 x 1489 tokens, not 9 x 1357
        (128, 64, (0, 60), (0,), (68, 64)),
        (512, 512, tuple(range(0, 433, 72)), tuple(range(0, 433, 72)), (80, 80)),
    ],
)
def test_tiles_stretch_where_fewer_cost_less(height, width, tops, lefts, tile):
    plan = even_tiles(height, width, Tiling(64, 8, 2, stretch=16))
    assert (plan.tops, plan.lefts, (plan.tile_height, plan.tile_width)) == (tops, lefts, tile)


@given(even, even, st.integers(2, 40), st.data())
def test_even_tiles_cover_everything_on_patches_with_the_wanted_overlap(height, width, half_tile, data):
    tile = 2 * half_tile
    overlap = 2 * data.draw(st.integers(0, half_tile - 1))
    stretch = data.draw(st.integers(0, 20))
    settings = Tiling(tile, overlap, 2, stretch=stretch)
    plan = even_tiles(height, width, settings)
    if not needs_tiles(height, width, settings):
        assert (len(plan), plan.tile_height, plan.tile_width) == (1, height, width)
        return
    for starts, side, length in ((plan.tops, plan.tile_height, height), (plan.lefts, plan.tile_width, width)):
        assert min(tile, length) <= side <= max(min(tile, length), min(tile + stretch, length))
        assert starts[0] == 0
        assert starts[-1] + side == length
        assert all(start % 2 == 0 for start in starts)
        steps = [b - a for a, b in itertools.pairwise(starts)]
        assert all(0 < step <= side - overlap for step in steps)
        assert not steps or max(steps) - min(steps) <= 2
        assert len(starts) == (1 if side == length else -(-(length - side) // (side - overlap)) + 1)
    if stretch:
        assert len(plan) <= len(even_tiles(height, width, Tiling(tile, overlap, 2)))


def test_a_long_strip_is_cut_where_the_model_has_no_positions():
    settings = Tiling(64, 8, 2, longest_side=384)
    assert len(even_tiles(8, 384, settings)) == 1
    assert len(even_tiles(8, 386, settings)) > 1


@pytest.mark.parametrize(("tile", "expected"), [(64, (64, 20)), (48, (48, 14)), (16, (16, 4)), (33, (32, 10)), (512, (96, 20))])
def test_a_smaller_tile_keeps_the_share_that_overlaps(tile, expected):
    settings = Tiling(64, 20, 2, longest_side=96).with_tile(tile)
    assert (settings.tile, settings.overlap) == expected


@pytest.mark.parametrize(
    ("tile", "overlap", "longest", "named"),
    [(63, 8, None, "tile 63"), (0, 0, None, "tile 0"), (64, 64, None, "overlap 64"), (64, 7, None, "overlap 7"),
     (64, -2, None, "overlap -2"), (256, 8, 128, "tile 256")],
)  # fmt: skip
def test_impossible_settings_are_named(tile, overlap, longest, named):
    with pytest.raises(ValueError, match=named):
        Tiling(tile, overlap, 2, longest)


def test_a_tile_cut_to_what_the_model_sees_keeps_the_share_that_overlaps():
    """Not its cells: 126 of 128 would make 37 249 tiles of this latent."""
    settings = choose_tiling(384, 128, 2, longest_side=128)
    assert (settings.tile, settings.overlap) == (128, 42)
    assert len(even_tiles(512, 512, settings)) == 36
    published = choose_tiling(384, 8, 2, longest_side=128)
    assert (published.tile, published.overlap) == (128, 8), "no less than the published share, or what was wanted"
    assert choose_tiling(384, 4, 2, longest_side=128).overlap == 4


def test_a_model_that_sees_less_than_the_published_tile_takes_its_share_of_the_overlap():
    settings = choose_tiling(None, 8, 2, longest_side=8)
    assert (settings.tile, settings.overlap, settings.longest_side) == (8, 0, 8)


@given(even, even, st.none() | st.integers(8, 192).map(lambda n: 2 * n), st.data())
def test_whatever_is_chosen_each_place_lies_in_few_tiles(height, width, tile, data):
    overlap = 2 * data.draw(st.integers(0, max_overlap(tile or 64) // 2))
    longest = data.draw(st.sampled_from([None, 32, 64, 128, 384]))
    settings = choose_tiling(tile, overlap, 2, longest, affordable=data.draw(st.sampled_from([16, 32, 64])))
    assert settings.tile - settings.overlap >= settings.tile / 4
    needed = math.ceil(height / settings.tile) * math.ceil(width / settings.tile)
    assert len(even_tiles(height, width, settings)) <= 4**2 * needed


@pytest.mark.parametrize(("tile", "overlap"), [(16, 14), (64, 62), (64, 64), (64, 128), (None, 50), (None, 128)])
def test_an_overlap_near_the_tile_is_refused(tile, overlap):
    with pytest.raises(ValueError, match=rf"tile overlap {overlap}: expected at most (12|48), three quarters of the tile"):
        choose_tiling(tile, overlap, 2, None)
