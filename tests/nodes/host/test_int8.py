"""Bundles with int8 weights in a real ComfyUI, against the core on diffusers and against comfy-kitchen's own int8 weights."""

import json
import subprocess
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from tsdsr_core.families.bundle import read_bundle
from tsdsr_core.families.load import from_bundle, load
from tsdsr_core.weights.float8 import SCALE, is_matrix
from tsdsr_core.weights.int8 import dequantise, group, quantise, rotate
from tsdsr_core.weights.lora import load_lora, merge_lora
from tsdsr_core.weights.prompt import load_prompt

from ...comfyui import host as host_module
from ...comfyui.graphs import CPU, core_sd3, differs
from ...comfyui.host import Graph
from ...comfyui.quantised import core, load_node, upscale, write

KEY = "transformer_blocks.0.ff.net.2.weight"


@pytest.fixture(scope="module")
def knows_int8(host):
    """Whether this ComfyUI knows rotated int8 weights; from 0.27 on."""
    folder, _ = host_module.find()
    return "int8_tensorwise" in (folder / "comfy" / "quant_ops.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "folded"])
def bundle(request, host, sd3):
    """The path of an int8 bundle and whether it is folded."""
    name = "int8-folded" if request.param else "int8"
    return write(host, core_sd3(sd3), name, request.param, "int8"), request.param


def product(numbers, scale, bias, x):
    """A layer in int8: its input rotated, and each row of it rounded to int8 with a scale of its own."""
    x = rotate(x)
    step = x.abs().amax(-1, keepdim=True) / 127
    exact = (x / step).round() @ numbers.float().T  # whole numbers below 2^24, where fp32 has them all
    return exact * step * scale.T + bias


def in_int8(stored):
    """The core's model of an int8 bundle, with products in int8."""
    model = from_bundle(stored, CPU, torch.float32)
    for name, module in model.transformer.named_modules():
        if is_matrix(key := f"{name}.weight"):
            module.forward = partial(product, stored.transformer[key], stored.transformer[key + SCALE], module.bias)
    return model


def velocity(model):
    """What the core's model makes of the latents of the node TestVelocity."""
    return model.velocity(torch.sin(torch.arange(1024.0)).reshape(1, 16, 8, 8)).flatten()


def told_velocity(result, node):
    return torch.tensor(json.loads(result.outputs[node]["text"][0]))


def distance(found, expected):
    """Relative to what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def test_it_is_converted_while_loading_where_products_in_int8_are_slow(bundle, host, knows_int8):
    """On this host's CPU, and in any host before 0.27."""
    path, _ = bundle
    graph = Graph()
    loader = load_node(graph, path)
    save, told = upscale(graph, loader, (loader, 0), "int8"), graph.add("TestWeights", model=(loader, 0))
    cases = graph.add("TestMultipliesInt8", model=(loader, 0))
    v = graph.add("TestVelocity", model=(loader, 0), conditioning=(loader, 2))
    result = host.run(graph)
    assert result.status == "success", result.error
    model = from_bundle(read_bundle(path), CPU, torch.float32)
    assert differs(result.pictures(save)[0], core(host, model)) <= 1
    assert distance(told_velocity(result, v), velocity(model)) < 1e-4, "matrices in fp16, as the bundle is"
    assert "torch.int8" not in json.loads(result.outputs[told]["text"][0])
    found = json.loads(result.outputs[cases]["text"][0])
    expected = {"CPU": False, "host without int8": False}
    if knows_int8:
        expected |= {"fast": True, "slow": False, "failing": False, "wrong": False}
    assert found == expected


def test_products_in_int8_are_those_that_the_format_defines(bundle, host, knows_int8):
    """Rounding the inputs changes the velocity; the core does the same with layers written here.

    Each row of an input is rounded in steps of 1/127 of its largest number, which is about 3 times its root mean square:
    an error of 3 / 127 / sqrt(12) = 0.7 % of the input and of the product. At most eight layers follow each other in two
    blocks; their errors are independent and add up to sqrt(8) x 0.7 % = 2 % where nothing amplifies them. Here they are
    less, since most of the velocity goes past these layers.

    The host's sums differ in the last digits of fp32, so that about one input in a thousand is rounded to the next number: an
    error of one step, where all inputs have one of 0.29. That is sqrt(0.001) / 0.29 = 0.1 of the effect of rounding; rounding
    in any other way than the format's would be 1.4, as two independent errors.
    """
    if not knows_int8:
        pytest.skip("this ComfyUI does not know int8 weights")
    path, _ = bundle
    graph = Graph()
    loader = load_node(graph, path)
    made = graph.add("TestInt8Products", model=(loader, 0))
    save, told = upscale(graph, loader, (made, 0), "int8"), graph.add("TestWeights", model=(made, 0))
    v = graph.add("TestVelocity", model=(made, 0), conditioning=(loader, 2))
    result = host.run(graph)
    assert result.status == "success", result.error
    stored = read_bundle(path)
    rounded = in_int8(stored)
    exact, expected, found = (
        velocity(from_bundle(stored, CPU, torch.float32)),
        velocity(rounded),
        told_velocity(result, v),
    )
    assert distance(found, expected) < 0.3 * distance(found, exact)
    assert 1e-4 < distance(found, exact) < 0.02
    assert differs(result.pictures(save)[0], core(host, rounded)) <= 1

    counted = json.loads(result.outputs[told]["text"][0])
    assert counted.pop("size") == sum(counted.values()), "what the host counts is what is there"
    matrices = sum(weight.numel() for key, weight in stored.transformer.items() if is_matrix(key))
    assert counted["torch.int8"] == matrices, "one byte for each number, half of fp16"


def test_comfy_kitchen_makes_the_same_int8_weights(host, knows_int8, tmp_path):
    """Numbers may differ by one where fp32 does not decide which side of a half they are on."""
    if not knows_int8:
        pytest.skip("this ComfyUI does not know int8 weights")
    _, python = host_module.find()
    torch.manual_seed(0)
    weights = {size: torch.randn(64, 3 * size if size > 1 else 24) for size in (256, 64, 16, 1)}
    for weight in weights.values():
        weight[:, 5] *= 30
        weight[7] = 0
    save_file({str(size): weight for size, weight in weights.items()}, tmp_path / "in.safetensors")
    script = host_module.ROOT / "tests" / "comfyui" / "kitchen_int8.py"
    subprocess.run([python, script, tmp_path / "in.safetensors", tmp_path / "out.safetensors"], check=True)
    theirs = load_file(tmp_path / "out.safetensors")
    for size, weight in weights.items():
        assert group(weight.shape[1]) == size
        ours = quantise({KEY: weight}, torch.float32)
        scale = theirs[f"{size}.scale"]
        torch.testing.assert_close(scale, ours[KEY + SCALE], rtol=1e-6, atol=0)
        odd = theirs[f"{size}.numbers"] != ours[KEY]
        halves = (rotate(weight) / scale)[odd]
        assert ((halves - halves.floor() - 0.5).abs() < 1e-3).all()
        assert odd.sum() < 5
        given = {KEY: theirs[f"{size}.numbers"], KEY + SCALE: scale}
        torch.testing.assert_close(dequantise(given, torch.float32)[KEY], theirs[f"{size}.weight"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("in_int8", [False, True])
def test_a_lora_goes_onto_int8_weights(in_int8, host, sd3, knows_int8):
    """Weights that stay in int8 are rounded again by the host; the core adds the LoRA to the dequantised ones."""
    if in_int8 and not knows_int8:
        pytest.skip("this ComfyUI does not know int8 weights")
    model = load(sd3.folder, loras=(), prompt=load_prompt(sd3.embeddings), device=CPU, dtype=torch.float32)
    path = write(host, model, "int8-base", False, "int8")
    graph = Graph()
    loader = load_node(graph, path)
    base = (graph.add("TestInt8Products", model=(loader, 0)), 0) if in_int8 else (loader, 0)
    lora = graph.add(
        "TSDSRLoadLora", model=base, vae=(loader, 1), transformer_lora="tsdsr/transformer.safetensors",
        vae_lora="tsdsr/vae.safetensors", transformer_strength=1.0, vae_strength=0.0, vae_precision="fp32",
    )  # fmt: skip
    plain, patched = (
        graph.add("TestVelocity", model=node, conditioning=(loader, 2)) for node in (base, (lora, 0))
    )  # fmt: skip
    save = upscale(graph, loader, (lora, 0), "int8")
    result = host.run(graph)
    assert result.status == "success", result.error
    model = from_bundle(read_bundle(path), CPU, torch.float32)
    merge_lora(model.transformer, load_lora(sd3.loras / "transformer.safetensors"))
    effect, error = (distance(told_velocity(result, node), velocity(model)) for node in (plain, patched))
    assert error < (0.05 if in_int8 else 0.005) * effect, "the LoRA is there, once more rounded or not"
    assert differs(result.pictures(save)[0], core(host, model)) <= 2


@pytest.mark.parametrize("in_int8", [False, True])
def test_saving_it_again(in_int8, host, sd3, knows_int8):
    """Where it was converted while loading, it is saved without int8; in int8 it is one error."""
    if in_int8 and not knows_int8:
        pytest.skip("this ComfyUI does not know int8 weights")
    path = write(host, core_sd3(sd3), "int8-again", False, "int8")
    graph = Graph()
    loader = load_node(graph, path)
    base = (graph.add("TestInt8Products", model=(loader, 0)), 0) if in_int8 else (loader, 0)
    saved = graph.add(
        "TSDSRSaveCheckpoint", model=base, vae=(loader, 1), conditioning=(loader, 2), filename_prefix="int8-saved", dtype="fp32"
    )
    result = host.run(graph)
    if in_int8:
        assert result.status == "error"
        assert "the model is quantised" in result.error
        assert len(result.error.strip().splitlines()) == 1
        return
    assert result.status == "success", result.error
    first, again = read_bundle(path), read_bundle(host.base / "output" / result.outputs[saved]["text"][0])
    assert not again.int8
    for key, weight in first.transformer_weights(torch.float16).items():
        assert torch.equal(again.transformer[key].half(), weight), key
