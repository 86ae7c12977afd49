"""The pipeline over callables whose results are known."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tsdsr_core import pipeline
from tsdsr_core.pipeline import Model, Options, bicubic, check_image, match_input, pad_to, restore
from tsdsr_core.system.memory import ImageDevice
from tsdsr_core.tiles.memory import TileMemory

from ..support.tiny import photo


def lossless(velocity=torch.zeros_like, **changes) -> Model:
    """An autoencoder that loses nothing (pixels move into channels), so that only the pipeline acts."""
    values = {
        "encode": lambda x: F.pixel_unshuffle(x, 8),
        "velocity": velocity,
        "decode": lambda z: F.pixel_shuffle(z, 8),
        "scaling_factor": 1.5305,
    }
    return Model(**{**values, **changes})


@pytest.mark.rounding
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.floats(1, 16),
    st.integers(1, 3),
    st.sampled_from(["wavelet", "adain", "lab", "none"]),
)
@settings(max_examples=60)
def test_without_a_velocity_any_image_is_only_enlarged(height, width, scale, batch, fix):
    scale = min(scale, 300 / max(height, width)) if max(height, width) * scale > 300 else scale
    scale = max(1.0, scale)
    image = torch.rand(batch, 3, height, width)
    result = restore(image, lossless(), Options(scale=scale, colour_fix=fix, process_size=0))
    expected = bicubic(image, (int(height * scale + 0.5), int(width * scale + 0.5)))
    assert result.shape == expected.shape
    assert (result - expected).abs().max() < 2e-4


def test_small_images_are_worked_on_at_512_and_resized_back():
    seen = []

    def encode(x):
        seen.append(tuple(x.shape))
        return F.pixel_unshuffle(x, 8)

    result = restore(photo(30, 45), lossless(encode=encode), Options(scale=2))
    assert seen == [(1, 3, 512, 768)]
    assert result.shape == (1, 3, 60, 90)


def test_the_step_is_taken_in_scaled_latents():
    image = photo(64, 64)
    model = lossless(velocity=lambda z: torch.full_like(z, 0.3))
    result = restore(image, model, Options(scale=1, process_size=0, colour_fix="none"))
    assert (result - (image - 0.3 / 1.5305 / 2).clamp(0, 1)).abs().max() < 1e-5


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_strength_scales_the_step(strength):
    image = photo(64, 64) * 0.5 + 0.4
    model = lossless(velocity=lambda z: 0.1 * z.cos())
    plain = restore(image, model, Options(scale=1, process_size=0, colour_fix="none", strength=0))
    full = restore(image, model, Options(scale=1, process_size=0, colour_fix="none", strength=1))
    part = restore(image, model, Options(scale=1, process_size=0, colour_fix="none", strength=strength))
    assert (part - (plain + strength * (full - plain))).abs().max() < 1e-5
    assert (full - plain).abs().max() > 0.01


def test_images_of_a_batch_do_not_bleed():
    images = photo(90, 120, batch=3)
    model = lossless(velocity=lambda z: 0.2 * z.roll(1, 2), memory=TileMemory())
    options = Options(scale=2, process_size=0, tile=16, tile_overlap=4)
    together = restore(images, model, options)
    apart = torch.cat([restore(images[i : i + 1], model, options) for i in range(3)])
    assert (together - apart).abs().max() < 1e-6


def test_tiles_get_smaller_where_the_free_memory_is_less_than_one_takes():
    seen = set()

    def velocity(tiles):
        seen.add(tuple(tiles.shape[2:]))
        return 0.2 * tiles

    def run(free, **options):
        seen.clear()
        memory = TileMemory(tile_bytes=lambda height, width: height * width, free=lambda: free)
        chosen = Options(scale=1, process_size=0, tile_overlap=20, **options)
        restore(photo(640, 640), lossless(velocity=velocity, memory=memory), chosen)
        return set(seen)

    assert run(10**9) == {(80, 80)}, "one tile, a little larger than published, costs less than four"
    assert run(48 * 48 * 2) == {(48, 48)}
    assert run(0) == {(20, 20)}, "about the least"
    assert run(0, tile=32) == {(32, 32)}, "what the user says is tried"


ROUNDING = 340 * 2**-24
"""Error of enlarging by a power of two and of the wavelet fix, of values in 0..1, in any order of IEEE fp32 without TF32.

In units of u = 2^-24: the positions are exact. Each of the two passes of bicubic takes four weights, of which a polynomial
gives each to 8, and adds up four products of at most 1.4 in all: 1.4 (4 * 8 + 6) = 53, so 106 for an image and 212 for the
difference of two. Each of the ten passes of the filter, whose weights are powers of two, rounds two sums of at most 1: 20. With
the 106 of the image that the low frequencies are added to, and the additions themselves, less than 340.
"""


@pytest.mark.rounding
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_finishing_rounds_no_more_than_fp32_does(layout):
    """Which is the bound for any device: two of them differ by at most twice as much."""
    restored, image = photo(64, 96, 1), photo(32, 48, 2).contiguous(memory_format=layout)
    exact = match_input(restored.double(), image.double(), (128, 192), Options())
    assert (match_input(restored, image, (128, 192), Options()) - exact).abs().max() <= ROUNDING


@pytest.mark.parametrize("stage", ["enlarge", "finish"])
def test_a_device_that_runs_out_in_a_stage_changes_nothing(stage, monkeypatch, caplog):
    """Pictures fit on the device from that stage on; it is one without data, so what ran there could not come back."""
    image, asked = photo(40, 48), []

    def free():
        asked.append(1)
        return 10**12 if len(asked) > {"enlarge": 0, "finish": 2}[stage] else 0

    def scarce(real):
        def run(x, *given):
            if x.device.type == "meta":
                raise torch.OutOfMemoryError("out of memory")
            return real(x, *given)

        return run

    expected = restore(image, lossless(), Options(scale=2, process_size=0))
    monkeypatch.setattr(pipeline, "pad_to", scarce(pad_to))
    monkeypatch.setattr(pipeline.colour, "match_colour", scarce(pipeline.colour.match_colour))
    model = lossless(image_device=ImageDevice(torch.device("meta"), free))
    assert torch.equal(restore(image, model, Options(scale=2, process_size=0)), expected)
    assert len(asked) == {"enlarge": 3, "finish": 3}[stage]
    assert len(caplog.records) == 1


def test_the_input_is_left_alone():
    image = photo(40, 40)
    before = image.clone()
    restore(image, lossless(), Options(process_size=0))
    assert torch.equal(image, before)


@pytest.mark.parametrize("count", [1, 3, 6, 7])
def test_memory_does_not_grow_with_the_batch(count, monkeypatch):
    """Of seven images of 64x64 never more than three have latents; the results are those of the images alone."""
    monkeypatch.setattr(pipeline, "GROUP_PIXELS", 3 * 64 * 64)
    latents, most, together, calls = weakref.WeakSet(), [0], [], []

    def counted(values):
        latents.add(values)
        most[0] = max(most[0], sum(len(found) for found in latents))
        return values

    def velocity(z):
        together.append(len(z))
        return 0.1 * z

    model = lossless(velocity, encode=lambda x: counted(F.pixel_unshuffle(x, 8)))
    images = photo(64, 64, batch=count)
    options = Options(scale=1, process_size=0, tile_batch=8)
    result = restore(images, model, options, lambda *call: calls.append(call))
    assert most[0] <= 3
    assert together == [3] * (count // 3) + [count % 3] * (count % 3 > 0)
    for stage in ("encode", "decode", "colour"):
        assert [call[1:] for call in calls if call[0] == stage] == [(done + 1, count) for done in range(count)]
    alone = torch.cat([restore(image[None], model, options) for image in images])
    assert torch.allclose(result, alone, atol=1e-6)


def test_progress_counts_every_stage_to_its_end():
    calls = []
    options = Options(scale=1, process_size=0, tile=16, tile_overlap=4, tile_batch=2)
    restore(photo(256, 256, batch=2), lossless(), options, lambda *call: calls.append(call))
    ends = {stage: (done, total) for stage, done, total in calls}
    assert ends == {"encode": (2, 2), "step": (18, 18), "decode": (2, 2), "colour": (2, 2)}
    assert [stage for stage, _, _ in calls] == ["encode"] * 2 + ["step"] * 9 + ["decode", "colour"] * 2


def test_a_cancelling_progress_callback_ends_the_run():
    class Cancelled(Exception):
        pass

    def progress(stage, done, total):
        if stage == "step":
            raise Cancelled

    with pytest.raises(Cancelled):
        restore(photo(64, 64), lossless(), Options(process_size=0), progress)


@pytest.mark.parametrize("recipe", ["default", "official"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("part", ["encode", "velocity", "decode"])
def test_a_result_that_is_not_finite_is_an_error_and_no_black_or_white_image(part, value, recipe):
    """A clamp makes 0 or 1 of infinity: one such value in a corner is found before."""
    sound = getattr(lossless(), part)

    def broken(x):
        result = sound(x).clone()
        result[..., -1, -1] = value
        return result

    named = {"encode": "VAE encoder", "velocity": "transformer", "decode": "VAE decoder"}[part]
    with pytest.raises(FloatingPointError, match=f"{named} is not finite .*fp32"):
        restore(photo(64, 64), lossless(**{part: broken}), Options(recipe=recipe, process_size=0, scale=2))


def test_a_step_that_overflows_in_16_bits_is_an_error():
    """Neither the latent nor the velocity is infinite, their difference is."""
    model = lossless(
        encode=lambda x: F.pixel_unshuffle(x, 8).half(),
        velocity=lambda z: torch.full_like(z, -60000),
        decode=lambda z: z.float(),
    )
    with pytest.raises(FloatingPointError, match="step is not finite"):
        restore(photo(64, 64), model, Options(scale=1, process_size=0, strength=2))


@pytest.mark.parametrize(
    ("tile", "overlap", "named"),
    [(17, 8, "tile 17"), (96, 32, "tile 96 is above the 64 latent cells"), (32, 26, "tile overlap 26: expected at most 24"),
     (32, 7, "tile overlap 7"), (None, 62, "tile overlap 62: expected at most 48")],
)  # fmt: skip
def test_tiles_that_do_not_suit_the_model_are_refused_before_any_work(tile, overlap, named):
    def never(x):
        raise AssertionError("work was done")

    with pytest.raises(ValueError, match=named):
        restore(photo(64, 64), lossless(encode=never, longest_side=64), Options(tile=tile, tile_overlap=overlap))


def test_a_model_that_sees_little_runs_with_the_defaults():
    counts = []
    model = lossless(velocity=lambda z: counts.append(len(z)) or torch.zeros_like(z), longest_side=8)
    restore(photo(64, 256), model, Options(scale=1, process_size=0))
    assert sum(counts) == 4


@pytest.mark.parametrize(
    "image",
    [torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.rand(0, 3, 8, 8), torch.rand(1, 3, 0, 8),
     torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.full((1, 3, 8, 8), torch.nan), torch.full((1, 3, 8, 8), torch.inf)],
)  # fmt: skip
def test_impossible_images_are_refused_before_any_work(image):
    def never(x):
        raise AssertionError("work was done")

    with pytest.raises(ValueError, match="expected"):
        restore(image, lossless(encode=never), Options())
    with pytest.raises(ValueError, match="expected"):
        check_image(image)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scale": 0.9}, "scale 0.9"),
        ({"scale": 17}, "scale 17"),
        ({"scale": float("nan")}, "scale nan"),
        ({"strength": -0.1}, "strength -0.1"),
        ({"strength": float("nan")}, "strength nan"),
        ({"recipe": "best"}, "'best'"),
        ({"colour_fix": "rainbow"}, "'rainbow'"),
        ({"scale": "4"}, "scale '4'"),
        ({"scale": True}, "scale True"),
        ({"scale": None}, "scale None"),
        ({"strength": float("inf")}, "strength inf"),
        ({"strength": "1"}, "strength '1'"),
        ({"tile_batch": 0}, "tile batch 0"),
        ({"tile_batch": 1.5}, "tile batch 1.5: expected a whole number"),
        ({"tile": 8}, "tile 8: expected a whole number of at least 16"),
        ({"tile": -64}, "tile -64"),
        ({"tile": 64.0}, "tile 64.0"),
        ({"tile": True}, "tile True"),
        ({"tile_overlap": -2}, "tile overlap -2"),
        ({"tile_overlap": None}, "tile overlap None"),
        ({"wavelet_levels": 0}, "wavelet levels 0: expected a whole number from 1 to 10"),
        ({"wavelet_levels": -3}, "wavelet levels -3"),
        ({"wavelet_levels": 11}, "wavelet levels 11"),
        ({"wavelet_levels": 2.5}, "wavelet levels 2.5"),
        ({"wavelet_levels": True}, "wavelet levels True"),
        ({"process_size": -1}, "process size -1: expected a whole number from 0 to 4096"),
        ({"process_size": 4097}, "process size 4097"),
        ({"process_size": float("nan")}, "process size nan"),
        ({"colour_fix": ["wavelet"]}, "colour fix .list.: expected one of wavelet, adain, lab, none"),
        ({"recipe": "official", "scale": 2.5}, "whole number"),
    ],
)
def test_impossible_options_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        Options(**changes)


def test_padding_reflects_where_it_can_and_repeats_where_it_must():
    image = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert pad_to(image, (2, 5))[0, 0, 0].tolist() == [0, 1, 2, 1, 0]
    assert pad_to(image, (5, 3))[0, 0, :, 0].tolist() == [0, 3, 3, 3, 3]
    assert pad_to(image, (2, 3)) is image


def test_enlarging_is_plain_bicubic_and_shrinking_is_anti_aliased():
    image = photo(20, 30)
    expected = F.interpolate(image, (50, 75), mode="bicubic", align_corners=False).clamp(0, 1)
    assert torch.equal(bicubic(image, (50, 75)), expected)
    stripes = torch.tensor([0.0, 1.0]).repeat(32).expand(1, 3, 64, 64)
    assert (bicubic(stripes, (16, 16)) - 0.5).abs().max() < 0.05


def test_too_little_memory_is_said_before_any_work():
    """For the padded size, in pixels."""
    asked = []

    def check(height, width):
        asked.append((height, width))
        raise MemoryError("the VAE needs more")

    never = lambda _: pytest.fail("there was work")  # noqa: E731
    model = Model(never, never, never, scaling_factor=1.0, check_memory=check)
    with pytest.raises(MemoryError, match="the VAE needs more"):
        restore(torch.rand(1, 3, 20, 30), model, Options(scale=2, process_size=0))
    assert asked == [(48, 64)]
