"""Every tensor on its device: the pipeline on accelerators that are not there, by ``FakeTensorMode``.

An operator on tensors of two devices fails as on the real one. Values are not looked at: other tests do that, on the CPU.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn

from tsdsr_core import colour
from tsdsr_core.families.load import from_bundle, merged_bundle
from tsdsr_core.families.restorer import Restorer
from tsdsr_core.families.sd3.fold import fold
from tsdsr_core.pipeline import Options, bicubic, restore
from tsdsr_core.system.memory import ImageDevice
from tsdsr_core.vae import execute, norms, transfer
from tsdsr_core.vae.execute import kernels_of, run
from tsdsr_core.vae.passes import NVIDIA, Kernels
from tsdsr_core.vae.plan import PLACES, plan_places
from tsdsr_core.vae.program import decoder_program, encoder_program
from tsdsr_core.weights import float8, int8
from tsdsr_core.weights.lora import Lora, LoraPair, merge_lora
from tsdsr_core.weights.prompt import PromptEmbeds

from ..support.fake_device import FakeDevice, install
from ..support.tiny import TRANSFORMER, VAE

CPU = torch.device("cpu")
SHALLOW = VAE | {
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (8, 16),
    "layers_per_block": 1,
}  # fmt: skip
QUICK = Options(scale=2, process_size=16)
KERNELS = {"fused": NVIDIA, "scored": Kernels("scored", unfolded=True), "streamed": Kernels("streamed", unfolded=True)}


@pytest.fixture
def mode(monkeypatch):
    """A CUDA device without data."""
    yield from entered(monkeypatch, "cuda")


@pytest.fixture
def narrow(monkeypatch):
    """A device without data of a kind that has no float64."""
    yield from entered(monkeypatch, "mps")


def entered(monkeypatch, kind: str):
    forget()
    with install(monkeypatch, kind) as fake:
        yield fake
    forget()
    assert not fake.wide


def forget() -> None:
    """What is kept of a device."""
    for kept in (transfer._streams, norms._quickest, norms._shares):
        kept.cache_clear()


def model_on(mode: FakeDevice, dtype: torch.dtype = torch.float16) -> Restorer:
    prompt = PromptEmbeds(torch.randn(1, 9, 24), torch.randn(1, 20))
    return Restorer(SD3Transformer2DModel(**TRANSFORMER), AutoencoderKL(**SHALLOW), prompt, mode.device, dtype)


def picture(device: torch.device, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 20, 28).to(device)


def everywhere(module: nn.Module) -> set[str]:
    """Types of the devices on which a module's weights lie."""
    return {value.device.type for value in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", ["device", "host"])
def test_restoring(mode, place, dtype):
    """Of pictures that lie on the device, and of large ones in host memory."""
    where = mode.device if place == "device" else CPU
    result = restore(picture(where, 2), model_on(mode, dtype).model(), QUICK)
    assert (tuple(result.shape), result.device) == ((2, 3, 40, 56), where)


RESIZING, FILTERING = "aten::upsample_bicubic2d", "aten::replication_pad2d"
"""What enlarges pictures, and what only the wavelet fix does."""


def test_pictures_are_worked_on_beside_the_model(mode):
    assert restore(picture(CPU), model_on(mode).model(), QUICK).device == CPU
    assert mode.ran[RESIZING] == mode.ran[FILTERING] == {"cuda"}


def test_pictures_are_worked_on_by_the_cpu_where_they_do_not_fit(mode):
    model = model_on(mode)
    model.memory_limit = 4 * 72 * 40 * 56 - 1
    assert restore(picture(CPU), model.model(), QUICK).device == CPU
    assert mode.ran[RESIZING] == mode.ran[FILTERING] == {"cpu"}


@pytest.mark.parametrize("place", ["device", "host"])
@pytest.mark.parametrize("failing", ["encode", "decode", "match_input"])
def test_pictures_come_off_the_device_where_its_memory_runs_out(mode, place, failing, monkeypatch, caplog):
    """In any stage of the second of three, together with what the first one left there."""
    where, calls, run = mode.device if place == "device" else CPU, [], ImageDevice.run

    def counted(device, height, width, work, *tensors):
        def watched(*given):
            calls.append((work.__name__, given[0].device.type))
            if calls[-1] == (failing, mode.device.type) and calls.count(calls[-1]) == 2:
                raise torch.OutOfMemoryError("out of memory")
            return work(*given)

        return run(device, height, width, watched, *tensors)

    monkeypatch.setattr(ImageDevice, "run", counted)
    result = restore(picture(where, 3), model_on(mode).model(), QUICK)
    assert (tuple(result.shape), result.device) == ((3, 3, 40, 56), where)
    assert len(caplog.records) == 1
    places = [kind for _, kind in calls]
    assert places == sorted(places, reverse=True), "once off the device, they stay off it"
    assert len(places) == 10


def test_latent_tiles(mode):
    result = restore(picture(mode.device), model_on(mode).model(), replace(QUICK, tile=16, tile_overlap=4, tile_batch=2))
    assert result.device == mode.device


def test_the_official_recipe(mode):
    """Of a size that needs no resizing, for which Pillow wants data."""
    whole = torch.rand(1, 3, 16, 32).to(mode.device)
    result = restore(whole, model_on(mode).model(), replace(QUICK, recipe="official", scale=1))
    assert result.device == mode.device


def test_a_sampled_posterior(mode):
    result = restore(picture(mode.device), model_on(mode).model("sample", seed=3), QUICK)
    assert result.device == mode.device


def test_shrinking_runs_where_there_is_a_kernel(narrow):
    assert bicubic(picture(narrow.device), (10, 12)).device == narrow.device
    assert narrow.ran["aten::_upsample_bicubic2d_aa"] == {"cpu"}


def run_tiled(mode: FakeDevice, program, maps, keys, kernels, tile: int = 16) -> None:
    vae = nn.Module.to(AutoencoderKL(**SHALLOW), mode.device, torch.float16).eval().requires_grad_(False)
    passes = program(vae)
    x = torch.randn(1, *((16, 13, 9) if program is decoder_program else (3, 26, 18))).half()
    x = x.to(mode.device) if maps == "device" else x
    plan = plan_places([op.spec for op in passes], *x.shape[2:], 2, None, tile, maps, keys, kernels)
    result = run(passes, x, plan, mode.device)
    assert result.device == x.device


@pytest.mark.parametrize("program", [decoder_program, encoder_program])
@pytest.mark.parametrize(("maps", "keys"), PLACES)
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_tiled_vae(mode, kernels, maps, keys, program):
    run_tiled(mode, program, maps, keys, KERNELS[kernels])


def test_maps_in_host_memory_stay_there(mode, monkeypatch):
    """Also where one tile is the whole map, which on the device becomes the map itself."""
    places = []

    def watch(name: str) -> None:
        real = getattr(execute, name)

        def watched(*given):
            result = real(*given)
            places.append(result.tensor.device.type)
            return result

        monkeypatch.setattr(execute, name, watched)

    watch("convolve")
    watch("attend")
    run_tiled(mode, decoder_program, "host", "device", NVIDIA, tile=5000)
    assert set(places) == {"cpu"}


@pytest.mark.parametrize(("maps", "keys"), PLACES)
def test_the_tiled_vae_takes_no_float64(narrow, maps, keys):
    run_tiled(narrow, decoder_program, maps, keys, kernels_of(narrow.device))


@pytest.mark.parametrize("fix", colour.METHODS)
def test_colour_fixes_take_no_float64(narrow, fix):
    x = picture(narrow.device)
    assert colour.match_colour(x, x, fix).device == narrow.device


def test_merging_loras_from_host_memory(mode):
    model = model_on(mode)
    for part, name in ((model.transformer, "proj_out"), (model.vae, "encoder.conv_in")):
        out, *ins = part.get_submodule(name).weight.shape
        pair = LoraPair(torch.randn(4, *ins), torch.randn(out, 4, *(1 for _ in ins[1:])), 4.0)
        assert merge_lora(part, Lora("transformer", {name: pair})) == 1
        assert everywhere(part) == {mode.device.type}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("quantised", [None, "float8", "int8"])
def test_bundles(mode, folded, quantised):
    """Made from a model on the device and loaded onto it again."""
    model = model_on(mode)
    if folded:
        fold(model.transformer, model.prompt.pooled)
    bundle = merged_bundle(model.transformer, model.vae, model.prompt, torch.float16, {}, {}, quantised)
    types = {weight.dtype for weight in bundle.transformer.values()}
    assert (bundle.eight_bit, bundle.int8) == (float8.STORED in types, int8.STORED in types)
    loaded = from_bundle(bundle, mode.device, torch.float16)
    assert everywhere(loaded.transformer) == everywhere(loaded.vae) == {mode.device.type}
    result = restore(picture(mode.device), loaded.model(), QUICK)
    assert result.device == mode.device


def test_a_tensor_on_the_wrong_device_is_found(mode):
    """What this module is for: one forgotten ``.to(device)``."""
    model = model_on(mode)
    restorer = model.model()
    astray = replace(restorer, velocity=lambda z: restorer.velocity(z) + torch.ones(1, 16, 1, 1, dtype=z.dtype))
    with pytest.raises(RuntimeError, match=r"found (at least )?two (different )?devices"):
        restore(picture(mode.device), astray, QUICK)
    model.prompt = model.prompt.to(CPU, torch.float16)
    with pytest.raises(RuntimeError, match=r"found (at least )?two (different )?devices"):
        restore(picture(mode.device), restorer, QUICK)


def test_float64_on_the_device_is_found(monkeypatch):
    with install(monkeypatch, "mps") as mode:
        torch.randn(4).to(mode.device).double()
    assert mode.wide
