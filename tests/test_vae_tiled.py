import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from tsdsr_core import vae_tiled
from tsdsr_core.sd3 import VAE_CONFIG
from tsdsr_core.train.dry_run import LiveBytes
from tsdsr_core.vae_mover import Mover, layout_of
from tsdsr_core.vae_plan import LEAST_TILE, plan_places
from tsdsr_core.vae_program import decoder_program, encoder_program
from tsdsr_core.vae_tiled import measure, merge, plan_and_run, run

from .test_vae_program import original_vae, small_vae

CPU = torch.device("cpu")


def plan_for(program, x: Tensor, tile: int | None = None, maps="device", keys="device", free=None):
    return plan_places([op.form for op in program], *x.shape[2:], x.dtype.itemsize, free, tile, maps, keys)


def tiled(program, x: Tensor, tile: int | None = None, maps="device", keys="device", **options) -> Tensor:
    return run(program, x, plan_for(program, x, tile, maps, keys), CPU, **options)


def worst(result: Tensor, reference: Tensor) -> float:
    return ((result.double() - reference.double()).abs().max() / reference.abs().max()).item()


def mean_error(result: Tensor, reference: Tensor) -> float:
    return (result.double() - reference).abs().mean().item()


def latents(height: int, width: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(seed))


def pixels(height: int, width: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads gain nothing on tensors this small, and wait for each other where others use the machine too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[8, 32])
def vae(request):
    return small_vae(request.param)


@torch.inference_mode()
def untiled(vae: AutoencoderKL, x: Tensor) -> Tensor:
    return vae.decode(x).sample if x.shape[1] == 16 else vae.encode(x).latent_dist.parameters


@pytest.mark.parametrize("size", [(13, 29), (37, 21)])
@pytest.mark.parametrize(("tile", "keys"), [(24, "device"), (24, "host"), (72, "host"), (None, "device"), (5000, "device")])
def test_decoding_equals_the_untiled_run(vae, size, tile, keys):
    z = latents(*size)
    assert worst(tiled(decoder_program(vae), z, tile, keys=keys), untiled(vae, z)) <= 1e-5


@pytest.mark.parametrize("size", [(104, 232), (107, 90), (8, 300), (171, 9)])
@pytest.mark.parametrize(("tile", "keys"), [(16, "device"), (40, "host"), (5000, "device")])
def test_encoding_equals_the_untiled_run(vae, size, tile, keys):
    x = pixels(*size)
    assert worst(tiled(encoder_program(vae), x, tile, keys=keys), untiled(vae, x)) <= 1e-5


@given(st.integers(1, 40), st.integers(1, 40), st.integers(LEAST_TILE, 60), st.sampled_from(["device", "host"]))
@settings(max_examples=15, deadline=None)
def test_any_size_and_tile(height, width, tile, keys):
    changes = {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2}
    vae = small_vae(4, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, **changes)
    z, x = latents(height, width), pixels(2 * height + 1, 2 * width)
    for program, given_ in ((decoder_program(vae), z), (encoder_program(vae), x)):
        assert (tiled(program, given_, tile, keys=keys) - untiled(vae, given_)).abs().max() <= 2e-5


@torch.no_grad()
def test_blocks_that_add_nothing_are_left_out_of_the_result_too():
    vae = small_vae()
    first, last = vae.decoder.up_blocks[0], vae.decoder.up_blocks[-1]
    middle = vae.encoder.mid_block.resnets
    for block in (*first.resnets[1:], *last.resnets[1:], *middle):
        block.conv2.weight.zero_()
        block.conv2.bias.zero_()
    for program, x, left_out in ((decoder_program, latents(17, 12), 4), (encoder_program, pixels(107, 90), 2)):
        assert len(program(vae, patched=True)) - len(program(vae)) == 2 * left_out
        assert worst(tiled(program(vae), x, 40), untiled(vae, x)) <= 1e-5


def test_the_original_layout_equals_diffusers(monkeypatch):
    vae = small_vae(32)
    original = original_vae(vae)
    z, x = latents(17, 12), pixels(107, 90)
    assert worst(tiled(decoder_program(original), z, 40), untiled(vae, z)) <= 1e-5
    assert worst(tiled(encoder_program(original), x, 40), untiled(vae, x)) <= 1e-5


@pytest.mark.parametrize(("dtype", "seeds"), [(torch.float16, 1), (torch.bfloat16, 3)])  # the CPU's fp16 is slow
def test_16_bit_is_no_worse_than_untiled(dtype, seeds):
    """Against fp64 with the same rounded weights; the greatest error is one draw, so that of all pictures counts."""
    ours, theirs = [], []
    for seed in range(seeds):
        vae = nn.Module.to(small_vae(8, seed), dtype)
        exact = nn.Module.double(copy.deepcopy(vae))
        for x, program in ((latents(9, 21), decoder_program(vae)), (pixels(75, 90), encoder_program(vae))):
            x = x.to(dtype)
            reference = untiled(exact, x.double())
            result, usual = tiled(program, x, 24, keys="host"), untiled(vae, x)
            assert result.dtype == dtype
            assert mean_error(result, reference) <= mean_error(usual, reference)
            ours.append(worst(result, reference))
            theirs.append(worst(usual, reference))
    assert sum(ours) <= 1.05 * sum(theirs)


def test_statistics_of_tiles_with_other_means():
    """The mean of the tiles' variances would be 1 here; that of the whole is far above it."""
    tiles = [torch.randn(1, 8, 11, width) + 50 * index for index, width in enumerate((5, 40, 17))]
    mean, variance = merge([part for tile in tiles for part in measure(tile)], 2)
    whole = torch.cat([tile.double() for tile in tiles], 3).reshape(2, -1)
    assert torch.allclose(mean.double(), whole.mean(1), rtol=1e-6)
    assert torch.allclose(variance.double(), whole.var(1, correction=0), rtol=1e-6)
    assert variance.min() > 500


def test_statistics_far_from_zero():
    """Summing squares alone would lose the variance here."""
    tile = 1000 + torch.randn(1, 4, 300, 300)
    _, variance = merge(measure(tile), 2)
    assert torch.allclose(variance.double(), tile.double().reshape(2, -1).var(1, correction=0), rtol=1e-4)


def test_statistics_of_a_constant_map():
    mean, variance = merge(measure(torch.full((1, 4, 30, 50), 3.0)) + measure(torch.full((1, 4, 30, 7), 3.0)), 2)
    assert torch.allclose(mean, torch.full((2,), 3.0))
    assert variance.max() <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_16_bit_maps_are_wide(dtype):
    tile = (200 * torch.randn(1, 4, 300, 300)).to(dtype)  # the sum of squares is beyond fp16
    mean, variance = merge(measure(tile), 1)
    assert mean.dtype == variance.dtype == torch.float32
    assert torch.allclose(variance.double(), tile.double().var(correction=0), rtol=1e-5)


@pytest.mark.parametrize(
    "picture",
    [
        torch.full((1, 3, 80, 80), 0.25),
        torch.zeros(1, 3, 80, 80),
        torch.linspace(-1, 1, 80).expand(1, 3, 80, 80).contiguous(),
        torch.cat([torch.full((1, 3, 80, 40), -1.0), torch.full((1, 3, 80, 40), 1.0)], 3),
    ],
    ids=["grey", "zero", "ramp", "halves"],
)
def test_plain_pictures(vae, picture):
    """Where a channel is constant and a group of its own, any rounding is enlarged by 1 / sqrt(eps) = 1000, untiled too."""
    result, reference = tiled(encoder_program(vae), picture, 24), untiled(vae, picture)
    exact = untiled(nn.Module.double(copy.deepcopy(vae)), picture.double())
    assert worst(result, reference) <= max(1e-5, 3 * worst(reference, exact))
    z = exact[:, :16].float()
    assert worst(tiled(decoder_program(vae), z, 24), untiled(vae, z)) <= 1e-5


@pytest.mark.parametrize("sharp", [1, 30])
@pytest.mark.parametrize("keys", ["device", "host"])
def test_attention_is_exact(sharp, keys):
    """Streamed too, over tiles of keys; also where few keys take nearly all weight and the greatest score comes late."""
    vae = small_vae(8)
    attention = vae.decoder.mid_block.attentions[0]
    attention.to_q.weight.mul_(sharp)
    attention.to_out[0].weight.mul_(5)
    z = latents(70, 67) * torch.linspace(0.1, 3, 70)[:, None]
    vae.decoder.up_blocks = vae.decoder.up_blocks[3:]
    vae.decoder.up_blocks[0].resnets[0] = vae.decoder.mid_block.resnets[1]
    vae.decoder.up_blocks[0].resnets = vae.decoder.up_blocks[0].resnets[:1]
    vae.decoder.conv_norm_out, vae.decoder.conv_out = nn.GroupNorm(8, 64), nn.Conv2d(64, 3, 3, padding=1)
    reference = untiled(nn.Module.double(copy.deepcopy(vae)), z.double())
    usual = worst(untiled(vae, z), reference)
    assert worst(tiled(decoder_program(vae), z, 40, keys=keys), reference) <= max(1e-5, 2 * usual)


def test_images_do_not_bleed_into_each_other():
    program, z = decoder_program(small_vae()), latents(9, 7, batch=3)
    together = tiled(program, z, 24)
    assert torch.equal(together, torch.cat([tiled(program, z[i : i + 1], 24) for i in range(3)]))


def test_ticks_count_all_tiles_of_all_images():
    program, z, ticks = decoder_program(small_vae()), latents(9, 7, batch=2), []
    total = 2 * plan_for(program, z, 24).tiles
    tiled(program, z, 24, tick=lambda done, total: ticks.append((done, total)))
    assert ticks == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("when", [1, 20, 60])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_changed_by_an_interrupt(when, error):
    vae, z = small_vae(), latents(9, 7)
    given_ = z.clone()
    modules = {name: dict(vars(module)) for name, module in vae.named_modules()}
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    program = decoder_program(vae)
    good = tiled(program, z, 24)

    def tick(done, total):
        if done == when:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        tiled(program, z, 24, tick=tick)
    assert {name: dict(vars(module)) for name, module in vae.named_modules()} == modules
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())
    assert torch.equal(z, given_)
    assert torch.equal(tiled(program, z, 24), good)


def short_of_memory(vae: nn.Module, side: int):
    """Makes every convolution of ``vae`` fail on more than ``side`` pixels."""

    def check(module, inputs):
        if max(inputs[0].shape[2:]) > side:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return [module.register_forward_pre_hook(check) for module in vae.modules() if isinstance(module, nn.Conv2d)]


def test_running_out_of_memory_halves_the_tiles_and_goes_on(caplog):
    vae, z, ticks, released = small_vae(), latents(9, 11), [], []
    program, reference = decoder_program(vae), untiled(vae, z)
    short_of_memory(vae, 40)
    total = plan_for(program, z, 64).tiles
    with caplog.at_level(logging.WARNING):
        result = tiled(program, z, 64, tick=lambda done, total: ticks.append((done, total)), release=lambda: released.append(1))
    assert worst(result, reference) <= 1e-5, "each tile counted and added once"
    assert {record.getMessage().split("; ")[1] for record in caplog.records} == {"going on with half of that"}
    assert len(released) == len(caplog.records) <= 2
    assert ticks == [(done, total) for done in range(1, total + 1)]


def test_memory_may_run_out_twice_and_in_a_residual(caplog):
    vae, x = small_vae(), pixels(96, 120)
    reference = untiled(vae, x)
    short_of_memory(vae.encoder.down_blocks[0].resnets[1].conv2, 30)
    result = tiled(encoder_program(vae), x, 96)
    assert worst(result, reference) <= 1e-5
    assert len(caplog.records) == 2


def test_no_memory_for_the_least_tile_says_what_to_do():
    vae = small_vae()
    short_of_memory(vae, 4)
    with pytest.raises(RuntimeError, match="one VAE tile of 9 pixels, the least there is: close other programs"):
        tiled(decoder_program(vae), latents(9, 7))


GPU_BYTES = 10**9


def run_as_on_a_gpu(monkeypatch, program, x, tile=None, free=lambda: GPU_BYTES, ram=lambda: 10**12, **options) -> Tensor:
    monkeypatch.setattr(vae_tiled, "_could_move", lambda plan, device: plan.maps == "device")
    return plan_and_run(program, x, CPU, free, tile, ram, **options)


@pytest.mark.parametrize("short", ["tiles", "maps"])
def test_maps_go_to_host_memory_where_the_devices_runs_out(monkeypatch, caplog, short):
    """Of a tile or of a map itself; the tiles are those of the plan, not cut ever smaller."""
    vae, z, released, places = small_vae(), latents(20, 24), [], []
    program, reference = decoder_program(vae), untiled(vae, z)
    space = vae_tiled._Picture._space

    def no_room(picture, step, place):
        places.append(place)
        if place == "device" and step.height > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return space(picture, step, place)

    if short == "maps":
        monkeypatch.setattr(vae_tiled._Picture, "_space", no_room)
    else:
        short_of_memory(vae, 104)
    tile = 96 if short == "maps" else None
    result = run_as_on_a_gpu(monkeypatch, program, z, tile, release=lambda: released.append(len(released)))
    assert worst(result, reference) <= 1e-5
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == "out of memory with the VAE's maps on the device; going on with them in host memory"
    assert all("going on with half" in message for message in messages[1:])
    assert len(released) == len(messages)
    if short == "maps":
        assert set(places) == {"device", "host"}
        assert len(messages) == 1


def test_maps_too_large_for_host_memory_are_named(monkeypatch):
    """Where the device's runs out, not before: its maps would have been there."""
    vae, z = small_vae(), latents(20, 24)
    short_of_memory(vae, 104)
    with pytest.raises(MemoryError, match="the VAE needs"):
        run_as_on_a_gpu(monkeypatch, decoder_program(vae), z, ram=lambda: 0)


def test_host_memory_is_the_last_place_and_there_tiles_get_smaller(monkeypatch, caplog):
    vae, z = small_vae(), latents(9, 11)
    reference = untiled(vae, z)
    short_of_memory(vae, 40)
    result = run_as_on_a_gpu(monkeypatch, decoder_program(vae), z, 64, free=lambda: 10**5 if caplog.records else GPU_BYTES)
    assert worst(result, reference) <= 1e-5
    assert "host memory" in caplog.records[0].getMessage()


def test_a_cpu_has_no_other_place(caplog):
    vae, z = small_vae(), latents(9, 11)
    reference = untiled(vae, z)
    short_of_memory(vae, 40)
    result = plan_and_run(decoder_program(vae), z, CPU, lambda: None, None, lambda: 10**12)
    assert worst(result, reference) <= 1e-5
    assert all("going on with half" in record.getMessage() for record in caplog.records)
    with pytest.raises(MemoryError, match="the VAE needs"):
        plan_and_run(decoder_program(vae), z, CPU, lambda: None, None, lambda: 10**4)


def test_errors_other_than_memory_end_the_run(monkeypatch, caplog):
    vae = small_vae()
    vae.decoder.conv_in.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_as_on_a_gpu(monkeypatch, decoder_program(vae), latents(9, 7))
    assert not caplog.records


def test_other_errors_pass_through():
    vae = small_vae()
    vae.decoder.conv_in.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        tiled(decoder_program(vae), latents(9, 7))


def test_a_host_hands_out_the_weights_of_norms():
    """As a host does that keeps them in another type."""
    vae, z, asked = small_vae(), latents(9, 7), []
    reference = tiled(decoder_program(vae), z, 24)
    kept = {}
    for module in vae.decoder.modules():
        if isinstance(module, nn.GroupNorm):
            kept[module] = module.weight.data.clone(), module.bias.data.clone()
            module.weight.data.zero_()

    def affine(norm, like):
        asked.append((like.dtype, like.device))
        return tuple(value.double() for value in kept[norm])

    assert torch.equal(tiled(decoder_program(vae), z, 24, affine=affine), reference)
    assert set(asked) == {(torch.float32, CPU)}
    assert len(asked) == len(kept) + 1, "once for each norm, and once more for the queries"


def test_a_plan_for_something_else_is_refused():
    vae = small_vae()
    program = decoder_program(vae)
    plan = plan_for(program, latents(9, 7))
    for other, x in ((program, latents(9, 8)), (encoder_program(vae), latents(9, 7)), (program, pixels(9, 7))):
        with pytest.raises(ValueError, match="the plan is for another program"):
            run(other, x, plan, CPU)


class MetaMover(Mover):
    """Keeps what a GPU keeps: the three last tiles that came, and the last result, which is on its way back."""

    def read(self, view):
        self.came = [*getattr(self, "came", [])[-2:], torch.empty_like(view)]
        return self.came[-1]

    def ready(self, view, tile):
        return tile.contiguous(memory_format=layout_of(view))

    def write(self, view, tile):
        self.leaving = tile


@pytest.mark.parametrize(
    ("half", "side", "maps", "keys", "free"),
    [
        ("decoder", 4096, "host", "device", 2.5),
        ("decoder", 2048, "host", "host", 2.5),
        ("decoder", 1024, "device", "device", 2.5),
        ("decoder", 512, "device", "device", 80),
        ("encoder", 2048, "host", "device", 2.5),
        ("encoder", 512, "device", "device", 80),
    ],
)
def test_counted_memory_is_the_planned_one(monkeypatch, half, side, maps, keys, free):
    """SD3's autoencoder in 16 bit without data: the bytes of the tensors that live at once."""
    with torch.device("meta"):
        vae = nn.Module.half(AutoencoderKL(**VAE_CONFIG)).eval().requires_grad_(False)
    program = decoder_program(vae) if half == "decoder" else encoder_program(vae)
    x = torch.empty(
        1, *((16, side // 8, side // 8) if half == "decoder" else (3, side, side)), dtype=torch.float16, device="meta"
    )
    plan = plan_for(program, x, None, maps, keys, int(free * 1e9))
    live, space, kept = LiveBytes([]), vae_tiled._Picture._space, []

    def marked_space(picture, step, place):
        with _disable_current_modes():  # a map in host memory does not count
            kept.append(space(picture, step, "device"))
        live.known.add(kept[-1].untyped_storage()._cdata)
        return kept[-1]

    def counted_space(picture, step, place):
        return (marked_space if place == "host" else space)(picture, step, place)

    monkeypatch.setattr(vae_tiled._Picture, "_space", counted_space)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value: torch.empty_like(query))
    if maps == "host":
        monkeypatch.setattr(vae_tiled, "Mover", MetaMover)
        live.known.add(x.untyped_storage()._cdata)
    with live:
        result = run(program, x, plan, torch.device("meta"))
    most = live.most - (maps == "host") * result.untyped_storage().nbytes()  # it would be in host memory, as x is
    assert most <= plan.device_bytes <= 1.5 * most
    if side == 4096:
        assert most <= 2.5e9
