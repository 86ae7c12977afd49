import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdsr_core.tiles.blend import centred_window, official_window, tiled_velocity, velocity_in_memory
from tsdsr_core.tiles.memory import TileMemory
from tsdsr_core.tiles.plan import Tiling, even_tiles, official_tiles

QUIET = lambda done, total, partial: None  # noqa: E731


def run(velocity, z, plan, window=None, batch=4, tick=QUIET):
    window = centred_window(plan.tile_height, plan.tile_width) if window is None else window
    return tiled_velocity(velocity, z, plan, window, batch, tick)


@pytest.mark.rounding
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_the_weights_of_all_tiles_sum_to_one(half_height, half_width, batch):
    z = torch.randn(2, 3, 2 * half_height, 2 * half_width)
    plan = even_tiles(*z.shape[2:], Tiling(24, 6, 2))
    assert (run(lambda tiles: torch.ones_like(tiles), z, plan, batch=batch) - 1).abs().max() <= 1e-6


@pytest.mark.rounding
@pytest.mark.parametrize("shape", [(64, 64), (90, 70), (64, 200), (130, 66)])
@pytest.mark.parametrize(("tiles", "window"), [(even_tiles, centred_window), (official_tiles, official_window)])
def test_a_pointwise_velocity_leaves_no_seam(shape, tiles, window):
    z = torch.randn(1, 4, *shape)
    plan = tiles(*shape, Tiling(32, 8, 2))
    assert len(plan) > 1
    result = run(torch.tanh, z, plan, window(plan.tile_height, plan.tile_width))
    assert (result - torch.tanh(z)).abs().max() <= 1e-6


def test_the_window_is_the_hand_calculated_gaussian():
    window = centred_window(4, 2)
    across = torch.tensor([-0.25, 0.25])
    down = torch.tensor([-0.375, -0.125, 0.125, 0.375])
    expected = torch.outer(torch.exp(-50 * down**2), torch.exp(-50 * across**2)) / (2 * torch.pi * 0.01)
    assert torch.allclose(window, expected, rtol=1e-5)
    assert torch.equal(window, window.flip(0))
    assert torch.equal(window, window.flip(1))
    assert not torch.equal(official_window(4, 2), official_window(4, 2).flip(0))


@pytest.mark.parametrize(
    ("images", "batch", "calls"), [(1, 1, [1] * 9), (1, 4, [3, 3, 3]), (2, 8, [6, 6, 6]), (1, 8, [5, 4]), (1, 100, [9])]
)
def test_the_number_of_calls_is_the_planned_one(images, batch, calls):
    seen, ticks = [], []

    def velocity(tiles):
        seen.append(len(tiles))
        return tiles

    plan = even_tiles(128, 128, Tiling(64, 8, 2))
    run(velocity, torch.randn(images, 2, 128, 128), plan, batch=batch, tick=lambda done, total, _: ticks.append((done, total)))
    assert seen == calls
    assert ticks[-1] == (9 * images, 9 * images)
    assert [done for done, _ in ticks] == torch.tensor(calls).cumsum(0).tolist()


def test_images_of_a_batch_do_not_bleed():
    z = torch.randn(3, 2, 40, 40)
    plan = even_tiles(40, 40, Tiling(16, 4, 2))
    together = run(lambda tiles: tiles.square(), z, plan, batch=5)
    apart = torch.cat([run(lambda tiles: tiles.square(), z[i : i + 1], plan, batch=5) for i in range(3)])
    assert torch.equal(together, apart)


@pytest.mark.rounding
def test_running_out_of_memory_halves_the_batch_and_goes_on(caplog):
    seen = []

    def velocity(tiles):
        seen.append(len(tiles))
        if len(tiles) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return tiles

    z = torch.randn(1, 2, 128, 128)
    plan = even_tiles(128, 128, Tiling(64, 8, 2))
    with caplog.at_level(logging.WARNING):
        result = run(velocity, z, plan, batch=9)
    assert seen == [9, 3] + [1] * 9
    assert torch.allclose(result, z, rtol=1e-6, atol=1e-6), "four weights are multiplied, summed and divided by: 8 roundings"
    assert len(caplog.records) == 2


def test_memory_for_not_even_one_tile_is_an_error():
    def velocity(tiles):
        raise torch.OutOfMemoryError("no memory at all")

    with pytest.raises(RuntimeError, match="out of memory with one tile: no memory at all"):
        run(velocity, torch.randn(1, 2, 32, 32), even_tiles(32, 32, Tiling(16, 4, 2)))


def test_tiles_of_half_the_side_follow_where_one_does_not_fit(caplog):
    released = []

    def velocity(tiles):
        if tiles.shape[2] > 16:
            raise torch.OutOfMemoryError("out of memory")
        return tiles.square()

    z = torch.randn(1, 2, 64, 96)
    memory = TileMemory(release=lambda: released.append(1))
    with caplog.at_level(logging.WARNING):
        result = velocity_in_memory(velocity, z, Tiling(64, 20, 2, batch=1), memory, lambda *_: None)
    assert torch.allclose(result, z.square(), atol=1e-6)
    assert len(released) == 2
    assert [record.getMessage().split("; ")[1] for record in caplog.records] == ["continuing with 32", "continuing with 16"]


def test_what_the_watcher_runs_out_of_is_not_put_down_to_the_tiles():
    def tick(done, total, partial):
        raise torch.OutOfMemoryError("the preview is too large")

    with pytest.raises(torch.OutOfMemoryError, match="the preview is too large"):
        velocity_in_memory(torch.square, torch.randn(1, 2, 64, 64), Tiling(), TileMemory(), tick)


def test_no_memory_for_the_least_tile_says_what_to_do():
    def velocity(tiles):
        raise torch.OutOfMemoryError("no memory at all")

    with pytest.raises(RuntimeError, match="one tile of 16 latent cells, the smallest size: close other programs"):
        velocity_in_memory(velocity, torch.randn(1, 2, 32, 32), Tiling(), TileMemory(), lambda *_: None)


def test_other_errors_pass_through():
    def velocity(tiles):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        run(velocity, torch.randn(1, 2, 32, 32), even_tiles(32, 32, Tiling(16, 4, 2)))


def test_the_velocity_so_far_grows_to_the_whole():
    plan, z = even_tiles(96, 64, Tiling()), torch.randn(1, 2, 96, 64)
    seen = []
    whole = run(lambda tiles: tiles.square(), z, plan, batch=1, tick=lambda done, total, partial: seen.append(partial()))
    assert len(seen) == 2
    assert torch.equal(seen[-1], whole)
    first = plan.tops[1]
    assert torch.allclose(seen[0][:, :, :first], whole[:, :, :first], atol=1e-6), "the first tile alone covers these rows"
    assert not seen[0][:, :, 64:].any(), "no tile of these rows is done"


def test_what_may_be_something_else_is_shown_as_it_is():
    """Smaller batches and tiles are tried against cuDNN's NOT_SUPPORTED; then it is what it says."""
    tried = []

    def velocity(tiles):
        tried.append(tuple(tiles.shape[2:]))
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")

    tiling = Tiling(64, 8, 2, batch=2)
    with pytest.raises(RuntimeError, match=r"^cuDNN error: CUDNN_STATUS_NOT_SUPPORTED$"):
        velocity_in_memory(velocity, torch.randn(1, 4, 64, 80), tiling, TileMemory(), lambda *_: None)
    assert {max(size) for size in tried} == {64, 32, 16}
    assert len(tried) <= 6


def test_a_host_may_know_other_words_for_running_out():
    def velocity(tiles):
        if len(tiles) > 1:
            raise RuntimeError("allocator says no")
        return tiles

    memory = TileMemory(ran_out=lambda error: "allocator says no" in str(error))
    z = torch.randn(1, 4, 64, 80)
    result = velocity_in_memory(velocity, z, Tiling(32, 8, 2, batch=4), memory, lambda *_: None)
    assert (result - z).abs().max() <= 1e-6
    with pytest.raises(RuntimeError, match=r"^allocator says no$"):
        velocity_in_memory(velocity, z, Tiling(32, 8, 2, batch=4), TileMemory(), lambda *_: None)
