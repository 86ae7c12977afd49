import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from tsdsr_core.families.load import load
from tsdsr_core.families.sd3.config import VAE_CONFIG
from tsdsr_core.train.dry_run import LiveBytes
from tsdsr_core.vae import execute, feature_map
from tsdsr_core.vae import plan as plan_module
from tsdsr_core.vae.execute import check_memory, plan_and_run, run
from tsdsr_core.vae.passes import Kernels
from tsdsr_core.vae.plan import MIN_TILE, plan_places, plan_tiles
from tsdsr_core.vae.program import decoder_program, encoder_program
from tsdsr_core.vae.statistics import measure, merge
from tsdsr_core.vae.transfer import Mover, layout_of

from .test_program import original_vae, small_vae

CPU = torch.device("cpu")
PROGRAMS = {"encoder": encoder_program, "decoder": decoder_program}
ROUNDING = 4e-5
"""Of ``worst``: the kernels of processors give up to 7e-6, a norm whose epsilon is 1e-5 instead of 1e-6 gives 6e-5 to 1e-4."""


def plan_for(program, x: Tensor, tile: int | None = None, maps="device", keys="device", free=None):
    return plan_places([op.spec for op in program], *x.shape[2:], x.dtype.itemsize, free, tile, maps, keys)


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


@pytest.fixture(scope="module")
def builtin():
    """Its first level has no blocks, so that the largest maps are read by one pass alone."""
    return load("builtin", device=CPU, dtype=torch.float32).vae


@pytest.mark.rounding
@pytest.mark.parametrize("tile", [24, None])
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_map_that_is_not_stored_changes_nothing(builtin, half, tile, monkeypatch):
    """Its tiles are computed again by the pass that reads it; only where they are measured does its own pass run."""
    program, x = (
        (encoder_program(builtin), pixels(84, 52)) if half == "encoder" else (decoder_program(builtin), latents(21, 13))
    )
    kept = plan_for(program, x, tile)
    monkeypatch.setattr(plan_module, "_LARGE_MAP", 1)
    plan = plan_for(program, x, tile)
    left_out = [(op.spec.rescale, step.runs) for op, step in zip(program, plan.steps, strict=True) if not step.stored]
    assert left_out[0 if half == "encoder" else -1] == (("same", False) if half == "encoder" else ("up", True))
    done = []
    result = run(program, x, plan, CPU, tick=lambda *count: done.append(count))
    assert done[-1] == (plan.tiles, plan.tiles)
    assert worst(result, run(program, x, kept, CPU)) <= 1e-6
    assert worst(result, untiled(builtin, x)) <= ROUNDING


@pytest.mark.rounding
@pytest.mark.parametrize("size", [(13, 29), (37, 21)])
@pytest.mark.parametrize(("tile", "keys"), [(24, "device"), (24, "host"), (72, "host"), (None, "device"), (5000, "device")])
def test_decoding_equals_the_untiled_run(vae, size, tile, keys):
    z = latents(*size)
    assert worst(tiled(decoder_program(vae), z, tile, keys=keys), untiled(vae, z)) <= ROUNDING


@pytest.mark.rounding
@pytest.mark.parametrize("size", [(104, 232), (107, 90), (8, 300), (171, 9)])
@pytest.mark.parametrize(("tile", "keys"), [(16, "device"), (40, "host"), (5000, "device")])
def test_encoding_equals_the_untiled_run(vae, size, tile, keys):
    x = pixels(*size)
    assert worst(tiled(encoder_program(vae), x, tile, keys=keys), untiled(vae, x)) <= ROUNDING


@pytest.mark.rounding
@given(st.integers(1, 40), st.integers(1, 40), st.integers(MIN_TILE, 60), st.sampled_from(["device", "host"]))
@settings(max_examples=15)
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
        assert worst(tiled(program(vae), x, 40), untiled(vae, x)) <= ROUNDING


@pytest.mark.rounding
def test_the_original_layout_equals_diffusers(monkeypatch):
    vae = small_vae(32)
    original = original_vae(vae)
    z, x = latents(17, 12), pixels(107, 90)
    assert worst(tiled(decoder_program(original), z, 40), untiled(vae, z)) <= ROUNDING
    assert worst(tiled(encoder_program(original), x, 40), untiled(vae, x)) <= ROUNDING


@pytest.mark.rounding
@pytest.mark.parametrize(("dtype", "seeds"), [(torch.float16, 1), (torch.bfloat16, 2)])  # the CPU's fp16 is slow
def test_16_bit_is_no_worse_than_untiled(dtype, seeds):
    """Against fp64 with the same rounded weights, where each norm rounds once; the greatest errors are single draws."""
    means, greatest = [], []
    for seed in range(seeds):
        vae = nn.Module.to(small_vae(8, seed), dtype)
        exact = nn.Module.double(copy.deepcopy(vae))
        for x, program in ((latents(9, 21), decoder_program(vae)), (pixels(75, 90), encoder_program(vae))):
            x = x.to(dtype)
            reference = untiled(exact, x.double())
            results = tiled(program, x, 24, keys="host"), untiled(vae, x)
            assert results[0].dtype == dtype
            means.append([mean_error(result, reference) for result in results])
            greatest.append([worst(result, reference) for result in results])
    ours, theirs = map(sum, zip(*means, strict=True))
    assert ours <= 0.95 * theirs, "kernels give 0.86 to 0.89, norms that round before they activate 1"
    ours, theirs = map(sum, zip(*greatest, strict=True))
    assert ours <= 2 * theirs, "kernels give 0.7 to 1.1, a seam would be many times that"


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


@pytest.mark.rounding
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
    enlarged = picture.std() == 0 and vae.config["norm_num_groups"] == vae.config["block_out_channels"][0]
    assert worst(result, reference) <= (3e-4 if enlarged else ROUNDING), "1000 * 2^-23 for each norm is 1e-4: kernels give 6e-5"
    z = reference[:, :16]
    assert worst(tiled(decoder_program(vae), z, 24), untiled(vae, z)) <= ROUNDING


def test_memory_is_checked_for_both_halves_before_any_work():
    vae, asked = small_vae(), []
    needed = {
        (half, itemsize): plan_tiles([op.spec for op in program(vae)], side, side, itemsize).device_bytes
        for half, program, side in (("encoder", encoder_program, 512), ("decoder", decoder_program, 64))
        for itemsize in (2, 4)
    }

    def ram(wanted):
        asked.append(wanted)
        return 10**6

    check_memory(PROGRAMS, vae, 16, 16, 8, (4, 4), CPU, None, None, ram)
    with pytest.raises(MemoryError, match=r"the VAE needs 0\.1 GB of memory for an image of this size, 0\.0 GB are free"):
        check_memory(PROGRAMS, vae, 512, 512, 8, (4, 4), CPU, None, None, ram)
    for encoder, decoder in ((4, 4), (2, 4), (4, 2), (2, 2)):
        with pytest.raises(MemoryError):
            check_memory(PROGRAMS, vae, 512, 512, 8, (encoder, decoder), CPU, None, None, ram)
        assert asked[-1] == max(needed["encoder", encoder], needed["decoder", decoder])
    assert len(set(asked)) > 2, "the type of a half counts"
    with pytest.raises(MemoryError):
        check_memory(PROGRAMS, vae, 512, 512, 8, (2, 4), CPU, None, None, ram, decodes=False)
    assert asked[-1] == needed["encoder", 2] < needed["decoder", 4], "of a draft, the encoder alone"


def test_images_do_not_bleed_into_each_other():
    program, z = decoder_program(small_vae()), latents(9, 7, batch=3)
    together = tiled(program, z, 24)
    assert torch.equal(together, torch.cat([tiled(program, z[i : i + 1], 24) for i in range(3)]))


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_searches_for_no_algorithms(monkeypatch, before):
    """Among so many shapes of tiles; what the user has set holds again afterwards."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    vae, seen = small_vae(), []
    vae.decoder.conv_out.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
    tiled(decoder_program(vae), latents(9, 7))
    assert seen == [False]
    assert torch.backends.cudnn.benchmark == before


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
    assert worst(result, reference) <= ROUNDING, "each tile counted and added once"
    assert {record.getMessage().split("; ")[1] for record in caplog.records} == {"continuing with half of that in this pass"}
    assert len(caplog.records) <= 2 < len(released), "each pass tries its own tiles; the log says it once"
    assert ticks == [(done, total) for done in range(1, total + 1)]


def test_memory_may_run_out_twice_and_in_a_residual(caplog):
    vae, x = small_vae(), pixels(96, 120)
    reference = untiled(vae, x)
    short_of_memory(vae.encoder.down_blocks[0].resnets[1].conv2, 30)
    result = tiled(encoder_program(vae), x, 96)
    assert worst(result, reference) <= ROUNDING
    assert len(caplog.records) == 2


def test_a_pass_that_ran_out_leaves_the_tiles_of_the_next_ones_alone():
    """One large residual block short of memory costs its own passes more tiles, and no other pass."""
    vae, z, seen = small_vae(), latents(20, 24), {}
    program, reference = decoder_program(vae), untiled(vae, z)
    short_of_memory(vae.decoder.up_blocks[0].resnets[0].conv1, 20)
    for op in program:
        for module in (m for m in vars(op).values() if isinstance(m, nn.Conv2d)):
            module.register_forward_hook(lambda *_, name=op.name: seen.update({name: seen.get(name, 0) + 1}))
    assert worst(tiled(program, z), reference) <= ROUNDING
    tiles = {op.name: len(step.regions) for op, step in zip(program, plan_for(program, z).steps, strict=True)}
    more = {name for name, count in seen.items() if count > 2 * tiles[name]}
    assert more == {"decoder.up_blocks.0.resnets.0.conv1"}


def test_what_may_be_something_else_is_shown_as_it_is(caplog):
    """cuDNN's NOT_SUPPORTED comes of too many elements too: smaller tiles are tried, down to the least, and no longer."""
    vae, tries = small_vae(), []

    def refuse(module, inputs):
        tries.append(max(inputs[0].shape[2:]))
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ...")

    vae.decoder.up_blocks[1].resnets[0].conv1.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match=r"^cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"):
        tiled(decoder_program(vae), latents(20, 24))
    assert tries == sorted(tries, reverse=True)
    assert tries[0] > 2 * tries[-1]
    assert len(tries) <= 4


def test_a_host_may_know_other_words_for_it():
    vae, z, tries = small_vae(), latents(9, 11), []
    reference = untiled(vae, z)

    def fail_once(module, inputs):
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("allocator says no")

    vae.decoder.up_blocks[1].resnets[0].conv1.register_forward_pre_hook(fail_once)
    program = decoder_program(vae)
    result = tiled(program, z, ran_out=lambda error: "allocator says no" in str(error))
    assert worst(result, reference) <= ROUNDING


def test_no_memory_for_the_least_tile_says_what_to_do():
    vae = small_vae()
    short_of_memory(vae, 4)
    with pytest.raises(RuntimeError, match="one VAE tile of 9 pixels, the smallest size: close other programs"):
        tiled(decoder_program(vae), latents(9, 7))


GPU_BYTES = 10**9


def run_as_on_a_gpu(monkeypatch, program, x, tile=None, free=lambda: GPU_BYTES, ram=lambda: 10**12, **options) -> Tensor:
    monkeypatch.setattr(execute, "_could_move", lambda plan, device: plan.maps == "device")
    monkeypatch.setattr(feature_map, "saves_time", lambda device, dtype: False)
    return plan_and_run(program, x, CPU, free, tile, ram, **options)


@pytest.mark.parametrize("short", ["tiles", "maps"])
def test_maps_go_to_host_memory_where_the_devices_runs_out(monkeypatch, caplog, short):
    """Of a tile, after it was cut in half twice, or of a map itself, for which smaller tiles would change nothing."""
    vae, z, released, places = small_vae(), latents(20, 24), [], []
    program, reference = decoder_program(vae), untiled(vae, z)
    space = feature_map.Workspace.allocate

    def no_room(workspace, step, place, x):
        places.append(place)
        if place == "device" and step.height > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return space(workspace, step, place, x)

    if short == "maps":
        monkeypatch.setattr(feature_map.Workspace, "allocate", no_room)
    else:
        short_of_memory(vae.decoder.up_blocks[3], 30)
    tile = 96 if short == "maps" else None
    result = run_as_on_a_gpu(monkeypatch, program, z, tile, release=lambda: released.append(len(released)))
    assert worst(result, reference) <= ROUNDING
    messages = [record.getMessage() for record in caplog.records]
    moved = messages.index("out of memory with the VAE's maps on the device; continuing with them in host memory")
    assert moved == (2 if short == "tiles" else 0)
    assert all("continuing with half" in message for message in messages[:moved] + messages[moved + 1 :])
    if short == "maps":
        assert set(places) == {"device", "host"}
        assert len(messages) == len(released) == 1


def test_half_a_tile_is_tried_before_host_memory(monkeypatch, caplog):
    vae, z = small_vae(), latents(20, 24)
    program, reference = decoder_program(vae), untiled(vae, z)
    short_of_memory(vae, 104)
    result = run_as_on_a_gpu(monkeypatch, program, z)
    assert worst(result, reference) <= ROUNDING
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with one VAE tile of 192 pixels; continuing with half of that in this pass"
    ]


def test_maps_too_large_for_host_memory_are_named(monkeypatch):
    """Where the device's runs out, not before: its maps would have been there."""
    vae, z = small_vae(), latents(20, 24)
    short_of_memory(vae, 30)
    with pytest.raises(MemoryError, match="the VAE needs"):
        run_as_on_a_gpu(monkeypatch, decoder_program(vae), z, ram=lambda: 0)


def test_host_memory_is_the_last_place_and_there_tiles_get_smaller(monkeypatch, caplog):
    vae, z = small_vae(), latents(9, 11)
    reference = untiled(vae, z)
    short_of_memory(vae, 20)
    result = run_as_on_a_gpu(monkeypatch, decoder_program(vae), z, 80, free=lambda: 10**5 if caplog.records else GPU_BYTES)
    assert worst(result, reference) <= ROUNDING
    moved = [index for index, record in enumerate(caplog.records) if "in host memory" in record.getMessage()]
    assert len(moved) == 1
    assert 0 < moved[0] <= 2


def test_a_cpu_has_no_other_place(caplog):
    vae, z = small_vae(), latents(9, 11)
    reference = untiled(vae, z)
    short_of_memory(vae, 40)
    result = plan_and_run(decoder_program(vae), z, CPU, lambda: None, None, lambda: 10**12)
    assert worst(result, reference) <= ROUNDING
    assert all("continuing with half" in record.getMessage() for record in caplog.records)
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


def test_a_host_hands_out_weights():
    """As a host does that keeps them in another type."""
    vae, z, asked = small_vae(), latents(9, 7), []
    reference = tiled(decoder_program(vae), z, 24)
    kept = {}
    for module in vae.decoder.modules():
        if isinstance(module, nn.GroupNorm | Upsample2D):
            module = module.conv if isinstance(module, Upsample2D) else module
            kept[module] = module.weight.data.clone(), module.bias.data.clone()
            module.weight.data.zero_()

    def weights_of(layer, like):
        asked.append((like.dtype, like.device))
        return tuple(value.double() for value in kept[layer])

    assert torch.equal(tiled(decoder_program(vae), z, 24, weights_of=weights_of), reference)
    assert set(asked) == {(torch.float32, CPU)}
    assert len(asked) == len(kept) + 1, "once for each norm or convolution, and once more for the queries"


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
    ("half", "side", "maps", "keys", "free", "attention"),
    [
        ("decoder", 4096, "host", "device", 2.5, "fused"),
        ("decoder", 2048, "host", "host", 2.5, "fused"),
        ("decoder", 1024, "device", "device", 2.5, "fused"),
        ("decoder", 512, "device", "device", 80, "fused"),
        ("encoder", 2048, "host", "device", 2.5, "fused"),
        ("encoder", 512, "device", "device", 80, "fused"),
        ("decoder", 2048, "host", "device", 2.5, "streamed"),
        ("encoder", 1024, "device", "device", 80, "streamed"),
    ],
)
def test_counted_memory_is_the_planned_one(monkeypatch, half, side, maps, keys, free, attention):
    """SD3's autoencoder in 16 bit without data: the bytes of the tensors that live at once."""
    with torch.device("meta"):
        vae = nn.Module.half(AutoencoderKL(**VAE_CONFIG)).eval().requires_grad_(False)
    program = decoder_program(vae) if half == "decoder" else encoder_program(vae)
    x = torch.empty(
        1, *((16, side // 8, side // 8) if half == "decoder" else (3, side, side)), dtype=torch.float16, device="meta"
    )
    specs, kernels = [op.spec for op in program], Kernels(attention)
    plan = plan_places(specs, *x.shape[2:], 2, int(free * 1e9), None, maps, keys, kernels)
    live, space, kept = LiveBytes([]), feature_map.Workspace.allocate, []

    def marked_space(workspace, step, place, x):
        with _disable_current_modes():  # a map in host memory does not count
            kept.append(space(workspace, step, "device", x))
        live.known.add(kept[-1].untyped_storage()._cdata)
        return kept[-1]

    def counted_space(workspace, step, place, x):
        return (marked_space if place == "host" else space)(workspace, step, place, x)

    monkeypatch.setattr(feature_map.Workspace, "allocate", counted_space)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value: torch.empty_like(query))
    if maps == "host":
        monkeypatch.setattr(feature_map, "Mover", MetaMover)
        live.known.add(x.untyped_storage()._cdata)
    with live:
        result = run(program, x, plan, torch.device("meta"))
    most = live.peak - (maps == "host") * result.untyped_storage().nbytes()  # it would be in host memory, as x is
    assert most <= plan.device_bytes <= 1.5 * most
    if side == 4096:
        assert most <= 2.5e9
