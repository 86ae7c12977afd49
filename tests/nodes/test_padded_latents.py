"""Where the image lies in a latent, on random latents without a host."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

PLACE = Path(__file__).parents[2] / "nodes" / "host" / "padded_latents.py"
SIZE, FACTOR = (44, 52), 8
"""In latents of 6x8 cells: 48x64 pixels."""
TURNS = list(itertools.product((False, True), range(4)))


@pytest.fixture
def placement():
    spec = importlib.util.spec_from_file_location("padded_latents", PLACE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def latents(seed=0, batch=1, height=6, width=8):
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(seed))


def encoded(placement, z, size=SIZE):
    return {"samples": z, placement.KEY: placement.Placement(z, size, FACTOR)}


def turned(z, mirrored, quarters):
    return torch.rot90(z.flip(-1) if mirrored else z, quarters, (-2, -1))


def seen(z, area):
    """What a decoder that repeats each cell shows within ``area``."""
    top, left, height, width = area
    pixels = z.repeat_interleave(FACTOR, -2).repeat_interleave(FACTOR, -1)
    return pixels[..., top : top + height, left : left + width]


@pytest.mark.parametrize(("mirrored", "quarters"), TURNS)
@pytest.mark.parametrize("size", [SIZE, (41, 64), (48, 49), (33, 57)])
def test_a_turned_image_is_cut_as_before_it_was_turned(placement, mirrored, quarters, size):
    z = latents()
    latent = encoded(placement, z, size)
    latent["samples"] = turned(z, mirrored, quarters)
    found = seen(latent["samples"], placement.image_area(latent, FACTOR))
    assert torch.equal(found, turned(seen(z, (0, 0, *size)), mirrored, quarters))


@pytest.mark.parametrize(("mirrored", "quarters"), TURNS)
def test_a_step_is_followed_in_every_turn(placement, mirrored, quarters):
    latent = encoded(placement, latents())
    before, change = (turned(latents(seed), mirrored, quarters) for seed in (0, 1))
    placement.follow(1.5 * before, change)
    found = placement.image_area({**latent, "samples": before - 0.3 * change}, FACTOR)
    assert found == placement.image_area({**latent, "samples": before}, FACTOR)
    assert found[2:] == (SIZE[::-1] if quarters % 2 else SIZE)


WHOLE = (0, 0, 48, 64)


def pasted(z, rows, columns):
    """``z`` with other values in some cells."""
    z = z.clone()
    z[..., rows, columns] = latents(9)[..., rows, columns]
    return z


CHANGED = {
    "rolled": lambda z: z.roll(1, -1),
    "another": lambda z: latents(9),
    "a mean with another": lambda z: (z + latents(9)) / 2,
    "noisy": lambda z: z + 0.01 * latents(9),
    "one padded cell": lambda z: pasted(z, 5, 2),
    "zero": lambda z: 0 * z,
    "nan": lambda z: torch.nan * z,
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_is_not_known_is_not_cut(placement, name):
    z = latents()
    latent = encoded(placement, z)
    latent["samples"] = CHANGED[name](z)
    assert placement.image_area(latent, FACTOR) == WHOLE


KEPT = {
    "a copy": lambda z: z.clone(),
    "a negative": lambda z: -3 * z,
    "in fp16": lambda z: z.half(),
    "in bf16": lambda z: z.bfloat16(),
    "in fp64": lambda z: z.double(),
    "rounded to bf16 and scaled": lambda z: (0.3 * z.bfloat16().float()).bfloat16().float(),
    "other cells changed": lambda z: pasted(z, slice(0, 5), slice(0, 6)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_the_padded_cells_is_cut(placement, name):
    z = latents()
    latent = encoded(placement, z)
    latent["samples"] = KEPT[name](z)
    assert placement.image_area(latent, FACTOR) == (0, 0, *SIZE)


def test_images_of_a_batch_are_known_in_any_order_and_number(placement):
    z = latents(batch=3)
    latent = encoded(placement, z)
    latent["samples"] = z[[2, 0, 0, 2]]
    assert placement.image_area(latent, FACTOR) == (0, 0, *SIZE)


def test_a_batch_of_several_encodings_gets_the_area_that_holds_them_all(placement):
    first, second, third = (encoded(placement, latents(seed), size) for seed, size in enumerate([SIZE, (46, 50), (41, 41)]))
    samples = torch.cat([latent["samples"] for latent in (first, second, third)])
    assert placement.image_area({**first, "samples": samples}, FACTOR) == (0, 0, 46, 52)
    assert placement.image_area({**first, "samples": torch.cat((samples, latents(9)))}, FACTOR) == WHOLE
    del second, third
    assert placement.image_area({**first, "samples": samples}, FACTOR) == WHOLE, "nothing else keeps their placements"


def test_a_latent_without_placement_is_not_cut(placement):
    latent = encoded(placement, latents())
    assert placement.image_area({"samples": latent["samples"]}, FACTOR) == WHOLE


def test_a_vae_of_another_factor_cuts_nothing(placement):
    latent = encoded(placement, latents())
    assert placement.image_area(latent, 4) == (0, 0, 24, 32)


def test_equal_latents_of_two_sizes_go_by_their_own(placement):
    z = latents()
    one, other = encoded(placement, z), encoded(placement, z.clone(), (46, 50))
    placement.follow(z, latents(1))
    for samples in (z, z - latents(1)):
        assert placement.image_area({**one, "samples": samples}, FACTOR) == (0, 0, *SIZE)
        assert placement.image_area({**other, "samples": samples}, FACTOR) == (0, 0, 46, 50)


def test_running_again_remembers_no_more(placement):
    z = latents()
    latent = encoded(placement, z)
    for _ in range(5):
        placement.follow(z, latents(1))
    assert len(latent[placement.KEY].known) == 2


def as_the_host(mask, size=(6, 8)):
    return F.interpolate(mask, size, mode="bilinear")


@pytest.mark.parametrize(("mirrored", "quarters"), TURNS)
def test_a_mask_lies_on_the_image_in_every_turn(placement, mirrored, quarters):
    """As if it had been padded as the image was, and then resized by the host."""
    z, mask = latents(), torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(1))
    latent = encoded(placement, z)
    padded = as_the_host(F.pad(mask, (0, 12, 0, 4), mode="replicate"))
    found = placement.fitted_mask(turned(mask, mirrored, quarters), turned(latent["samples"], mirrored, quarters))
    torch.testing.assert_close(found, turned(padded, mirrored, quarters))


@pytest.mark.parametrize("size", [(44, 52), (88, 104), (11, 13), (1, 500)])
def test_a_mask_of_any_size_covers_the_image(placement, size):
    """Its values are the places of its pixels between the left and the right border of the image."""
    latent = encoded(placement, latents())
    mask = ((torch.arange(size[1]) + 0.5) / size[1]).expand(1, 1, *size)
    found = placement.fitted_mask(mask, latent["samples"])
    centres = (torch.arange(8) + 0.5) * FACTOR / SIZE[1]
    torch.testing.assert_close(found, centres.clamp(0.5 / size[1], 1 - 0.5 / size[1]).expand(1, 1, 6, 8))


def test_masks_repeat_and_each_lies_on_its_own_image(placement):
    z, masks = latents(batch=3), torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(1))
    latent = encoded(placement, z)
    samples = torch.cat((latent["samples"], latents(9)))
    found = placement.fitted_mask(masks, samples)
    padded = as_the_host(F.pad(masks, (0, 12, 0, 4), mode="replicate"))
    torch.testing.assert_close(found, torch.cat((padded, padded[:1], as_the_host(masks[1:]))), msg="the last is not known")


def test_a_mask_that_the_host_stretched_goes_back_to_its_place(placement):
    latent = encoded(placement, latents())
    mask = (torch.arange(52) >= 32).float().expand(1, 1, *SIZE)
    found = placement.fitted_mask(as_the_host(mask), latent["samples"], stretched=True)
    assert (found[..., :3] == 0).all()
    assert (found[..., 3] < 0.5).all()
    assert (found[..., 4] > 0.5).all()
    assert (found[..., 5:] > 0.999).all()


def test_a_mask_of_the_padded_size_is_left_alone(placement):
    latent = encoded(placement, latents())
    for size in ((48, 64), (6, 8)):
        mask = torch.rand(1, 1, *size)
        assert placement.fitted_mask(mask, latent["samples"]) is mask
    mask = torch.rand(1, 1, *SIZE)
    assert placement.fitted_mask(mask, latents(9)) is mask, "not known"
