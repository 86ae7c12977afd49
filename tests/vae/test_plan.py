import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st

from tsdsr_core.families.sd3.config import VAE_CONFIG
from tsdsr_core.vae.passes import KEY_TILE, NVIDIA, Kernels, PassSpec, pass_bytes
from tsdsr_core.vae.plan import MIN_TILE, PLACES, Region, input_region, plan_places, plan_tiles
from tsdsr_core.vae.program import decoder_program, encoder_program

GB = 10**9
SAME, POINT = PassSpec("conv", 8, 8), PassSpec("conv", 8, 8, halo=0)
UP, DOWN = PassSpec("conv", 8, 8, "up"), PassSpec("conv", 8, 8, "down")


@pytest.fixture(scope="module")
def sd3():
    """The passes of SD3's decoder and encoder."""
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE_CONFIG)
    return {half: [op.spec for op in program(vae)] for half, program in PROGRAMS.items()}


PROGRAMS = {"decoder": decoder_program, "encoder": encoder_program}


@pytest.mark.parametrize(
    ("spec", "tile", "size", "area", "skip", "pad"),
    [
        (SAME, (0, 0, 10, 10), (10, 10), (0, 0, 10, 10), (0, 0), (0, 0)),
        (SAME, (0, 4, 4, 8), (10, 10), (0, 3, 5, 9), (0, 1), (0, 0)),
        (SAME, (8, 8, 10, 10), (10, 10), (7, 7, 10, 10), (1, 1), (0, 0)),
        (POINT, (4, 4, 8, 8), (10, 10), (4, 4, 8, 8), (0, 0), (0, 0)),
        (UP, (0, 0, 20, 20), (10, 10), (0, 0, 10, 10), (0, 0), (0, 0)),
        (UP, (4, 8, 8, 12), (10, 10), (1, 3, 5, 7), (2, 2), (0, 0)),
        (UP, (5, 7, 9, 20), (10, 10), (1, 2, 6, 10), (3, 3), (0, 0)),
        (DOWN, (0, 0, 5, 5), (10, 10), (0, 0, 10, 10), (0, 0), (1, 1)),
        (DOWN, (0, 0, 5, 5), (11, 10), (0, 0, 11, 10), (0, 0), (0, 1)),
        (DOWN, (2, 1, 4, 3), (11, 11), (4, 2, 9, 7), (0, 0), (0, 0)),
    ],
)
def test_what_a_tile_needs(spec, tile, size, area, skip, pad):
    need = input_region(spec, Region(*tile), *size)
    assert (need.area, need.skip, need.pad) == (Region(*area), skip, pad)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40))
def test_tiles_cover_a_map_once(height, width, tile_height, tile_width):
    count = torch.zeros(height, width)
    for tile in Region(0, 0, height, width).grid(tile_height, tile_width):
        assert 0 < tile.height <= tile_height
        assert 0 < tile.width <= tile_width
        count[tile.top : tile.bottom, tile.left : tile.right] += 1
    assert (count == 1).all()


@pytest.mark.parametrize(
    ("side", "free", "maps", "keys", "most"),
    [
        (512, 2.5, "device", "device", 0.7),
        (1024, 2.5, "device", "device", 2.0),
        (2048, 2.5, "host", "device", 1.0),
        (4096, 2.5, "host", "device", 1.5),
        (8192, 2.5, "host", "host", 1.0),
        (2048, 6, "device", "device", 4.8),
        (4096, 24, "device", "device", 16),
        (8192, 24, "host", "device", 4),
        (8192, 80, "device", "device", 56),
    ],
)
def test_places_of_the_maps(sd3, side, free, maps, keys, most):
    plan = plan_tiles(sd3["decoder"], side // 8, side // 8, 2, int(free * GB))
    assert (plan.maps, plan.keys, plan.fits) == (maps, keys, True)
    assert plan.device_bytes <= most * GB
    assert (plan.host_bytes == 0) == (maps == "device")
    assert (plan.steps[-1].height, plan.steps[-1].width) == (side, side)


@pytest.mark.parametrize(("half", "channels"), [("decoder", 384), ("encoder", 256)])
def test_the_bars_in_16_bit(sd3, half, channels):
    """4096^2 in 2.5 GB; from 2048^2 to 8192^2 the device's share grows by 1.2 at most.

    In host memory lie at most x of 256 channels, whose memory the result of 128 takes, and h of 128; 128 each in the encoder.
    Input and result come on top.
    """
    cells = {side: side // 8 if half == "decoder" else side for side in (2048, 4096, 8192)}
    plans = {side: plan_tiles(sd3[half], cells[side], cells[side], 2, int(2.5 * GB)) for side in cells}
    assert all(plan.maps == "host" and plan.fits for plan in plans.values())
    assert plans[4096].device_bytes <= 2.5 * GB
    assert plans[8192].device_bytes <= 1.2 * plans[2048].device_bytes
    assert plans[4096].host_bytes == (channels + 3) * 4096**2 * 2 + 16 * 512**2 * 2 * (1 if half == "decoder" else 2)


@pytest.mark.parametrize(("side", "free"), [(768, 80), (1024, 4), (2048, 12)])
def test_one_tile_where_everything_fits(sd3, side, free):
    """As large as the memory allows, not up to one size on every card."""
    plan = plan_tiles(sd3["decoder"], side // 8, side // 8 - 16, 2, free * GB)
    assert all(step.whole for step in plan.steps)
    assert plan.tiles == len(plan.steps)
    assert plan.fits


def test_tiles_take_about_the_same_memory_at_every_width(sd3):
    plan = plan_tiles(sd3["decoder"], 1024, 1024, 2, int(2.5 * GB))
    areas = {
        step.spec.in_channels: step.tile_height * step.tile_width for step in plan.steps if step.spec.kind == "residual_start"
    }
    assert areas[128] > 1.5 * areas[256] > 2 * areas[512]
    assert min(areas.values()) >= 256**2, "the halo of one pixel costs under 2 %"


def test_a_strip_gets_long_tiles(sd3):
    step = plan_tiles(sd3["decoder"], 4, 8192, 2, int(2.5 * GB)).steps[-1]
    assert step.tile_height == 32
    assert step.tile_width > 4096


@pytest.mark.parametrize("tile", [None, 4000, 10**6])
@pytest.mark.parametrize("free", [None, 10**13])
def test_no_tile_has_more_elements_than_kernels_can_count(sd3, tile, free):
    for step in plan_tiles(sd3["decoder"], 2048, 2048, 2, free, tile).steps:
        assert max(step.spec.in_channels, step.spec.out_channels) * step.tile_height * step.tile_width < 2**31


def test_the_cpu_stores_no_large_map_that_one_pass_reads():
    """2048x1376 in fp32: 64 channels at full size take 721 MB. What lies there at most is the map before, of a quarter."""
    up = PassSpec("conv", 64, 64, rescale="up", measured=True)
    specs = [PassSpec("conv", 16, 64), up, up, PassSpec("conv", 64, 3, normalised=True)]
    plan = plan_tiles(specs, 344, 512, 4)
    assert [step.stored for step in plan.steps] == [True, True, False, True]
    full, quarter = 64 * 1376 * 2048 * 4, 64 * 688 * 1024 * 4
    ends = (16 * 344 * 512 + 3 * 1376 * 2048) * 4
    assert quarter + ends < plan.device_bytes < quarter + ends + 150 * 2**20 < full
    on_a_device = plan_tiles(specs, 344, 512, 4, 80 * GB)
    assert all(step.stored for step in on_a_device.steps)
    small = plan_tiles(specs, 86, 128, 4)
    assert all(step.stored for step in small.steps), "computing twice is not worth it"


def test_a_large_map_that_two_passes_read_is_stored(sd3):
    """SD3's have blocks at each level, which read a map and add to it."""
    for half, sides in (("decoder", (256, 256)), ("encoder", (2048, 2048))):
        assert all(step.stored for step in plan_tiles(sd3[half], *sides, 4).steps)


def test_the_cpu_tiles_too(sd3):
    plan = plan_tiles(sd3["decoder"], 128, 128, 4)
    assert (plan.maps, plan.keys) == ("device", "device")
    assert max(step.tile_height for step in plan.steps) <= 512


@pytest.mark.parametrize("tile", [MIN_TILE, 20, 100, 5000])
@pytest.mark.parametrize("free", [None, 10 * GB])
def test_the_user_chooses_the_greatest_tile(sd3, tile, free):
    for step in plan_tiles(sd3["encoder"], 520, 1000, 2, free, tile).steps:
        assert step.tile_height <= tile
        assert step.tile_width <= tile
        if free is not None:
            assert step.whole == (max(step.height, step.width) <= tile)


@pytest.mark.parametrize("free", [None, GB, 2.5 * GB, 24 * GB])
def test_a_greatest_tile_takes_no_more_memory_than_none(sd3, free):
    """A side beyond the pictures changes nothing: memory and the choice of places hold for it as well."""
    free = None if free is None else int(free)
    plans = {tile: plan_tiles(sd3["decoder"], 512, 512, 2, free, tile) for tile in (None, 256, 10**6)}
    assert plans[10**6] == plans[None]
    assert plans[256].fits
    assert max(plans[256].device_bytes, plans[256].host_bytes) <= max(plans[None].device_bytes, plans[None].host_bytes)


def test_too_little_memory_still_gives_a_plan(sd3):
    plan = plan_tiles(sd3["decoder"], 512, 512, 2, 1000)
    assert (plan.maps, plan.keys, plan.fits) == ("host", "host", False)
    assert {step.tile_height for step in plan.steps} == {MIN_TILE}


@pytest.mark.parametrize(("free", "keys"), [(80 * GB, "device"), (1000, "host"), (None, "device")])
def test_only_the_given_places_are_tried(sd3, free, keys):
    plan = plan_tiles(sd3["decoder"], 96, 64, 2, free, places=PLACES[1:])
    assert (plan.maps, plan.keys) == ("host", keys)


def test_given_places_are_kept(sd3):
    plan = plan_places(sd3["decoder"], 64, 64, 2, 80 * GB, None, "host", "host")
    assert (plan.maps, plan.keys) == ("host", "host")
    assert plan.device_bytes < GB


@pytest.mark.parametrize("tile", [0, -16, MIN_TILE - 1])
def test_impossible_tiles_are_named(sd3, tile):
    with pytest.raises(ValueError, match=f"VAE tile {tile}: expected at least {MIN_TILE}"):
        plan_tiles(sd3["decoder"], 8, 8, 2, None, tile)


def test_an_image_too_small_for_the_program_is_an_error(sd3):
    with pytest.raises(ValueError, match="an image of 40x7 is too small"):
        plan_tiles(sd3["encoder"], 7, 40, 2)


CAREFUL = Kernels("streamed", unfolded=True)


@pytest.mark.parametrize("kernels", [CAREFUL, Kernels("scored", unfolded=True)])
@pytest.mark.parametrize("free", [2.5, 8, 24])
def test_scores_and_columns_fit_into_memory_too(sd3, kernels, free):
    """2048x2048 has 65536 queries and keys: all scores would take 17 GB, and the neighbours of one map 19 GB."""
    plan = plan_tiles(sd3["decoder"], 256, 256, 2, int(free * GB), kernels=kernels)
    assert plan.fits
    assert plan.device_bytes <= free * GB
    step = next(step for step in plan.steps if step.spec.kind == "attention")
    keys = 256**2 if kernels.attention == "scored" and plan.keys == "device" else KEY_TILE**2
    assert 2 * 4 * step.tile_height * step.tile_width * keys <= min(free * GB, 2**30)


def test_scores_are_counted(sd3):
    """Twice in fp32, before and after the softmax; of all keys, or of a tile of them."""
    spec = next(spec for spec in sd3["decoder"] if spec.kind == "attention")
    fused, scored, streamed = (
        pass_bytes(spec, 10, 20, 2, "device", "device", Kernels(attention), 128**2)
        for attention in ("fused", "scored", "streamed")
    )
    assert scored - fused >= 2 * 4 * 200 * 128**2
    assert streamed >= 2 * 4 * 200 * KEY_TILE**2
    assert streamed < scored
    assert streamed == pass_bytes(spec, 10, 20, 2, "device", "host", NVIDIA, 128**2), "as from host memory"


@pytest.mark.parametrize(("spec", "columns"), [(SAME, 12 * 22), (UP, 16 * 26), (DOWN, 10 * 20), (POINT, 0)])
def test_written_out_neighbours_are_counted(spec, columns):
    """Nine values of each channel for each pixel that a convolution gives; a pointwise one has none."""
    plain, unfolded = (
        pass_bytes(spec, 10, 20, 2, "device", "device", kernels, 200) for kernels in (NVIDIA, Kernels("fused", unfolded=True))
    )
    assert unfolded - plain == 9 * 8 * columns * 2


@pytest.mark.parametrize("kernels", [CAREFUL, Kernels("scored", unfolded=True)])
def test_no_matrix_has_more_elements_than_kernels_can_count(sd3, kernels):
    for step in plan_tiles(sd3["decoder"], 1024, 1024, 2, 10**13, kernels=kernels).steps:
        area = step.tile_height * step.tile_width
        keys = {"streamed": KEY_TILE**2, "scored": step.height * step.width}[kernels.attention]
        assert area * (keys if step.spec.kind == "attention" else 9 * step.spec.in_channels) < 2**31
