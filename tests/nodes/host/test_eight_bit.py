"""Bundles with 8-bit weights in a real ComfyUI, against the core on diffusers."""

import json

import numpy as np
import pytest
import torch

from tsdsr_core.families.bundle import read_bundle
from tsdsr_core.families.load import from_bundle, load
from tsdsr_core.weights.float8 import is_matrix
from tsdsr_core.weights.lora import load_lora, merge_lora
from tsdsr_core.weights.prompt import load_prompt

from ...comfyui.graphs import CPU, core_sd3, differs
from ...comfyui.host import Graph
from ...comfyui.quantised import core, load_node, upscale, write


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "folded"])
def bundle(request, host, sd3):
    """The path of an 8-bit bundle and whether it is folded."""
    name = "eight-bit-folded" if request.param else "eight-bit"
    return write(host, core_sd3(sd3), name, request.param, "float8"), request.param


def test_it_gives_what_the_core_gives_in_8_bits_of_memory(bundle, host):
    path, _ = bundle
    graph = Graph()
    loader = load_node(graph, path)
    models = {
        "loaded": (loader, 0),
        "built again": (graph.add("TestRebuilt", model=(loader, 0), eight_bit=True), 0),
        "without 8 bits": (graph.add("TestRebuilt", model=(loader, 0), eight_bit=False), 0),
    }
    saves = {name: upscale(graph, loader, model, "eight") for name, model in models.items()}
    told = {name: graph.add("TestWeights", model=model) for name, model in models.items()}
    result = host.run(graph)
    assert result.status == "success", result.error
    stored = read_bundle(path)
    expected = core(host, from_bundle(stored, CPU, torch.float32))
    for name, save in saves.items():
        assert differs(result.pictures(save)[0], expected) <= 1, name

    matrices = sum(weight.numel() for key, weight in stored.transformer.items() if is_matrix(key))
    for name in models:
        found = json.loads(result.outputs[told[name]]["text"][0])
        assert found.pop("size") == sum(found.values()), "what the host counts is what is there"
        eight = found.get("torch.float8_e4m3fn", 0)
        assert eight == (0 if name == "without 8 bits" else matrices), "one byte for each number, half of fp16"


def test_a_lora_goes_onto_8_bit_weights(host, sd3):
    """The host rounds patched weights to 8 bits again; the core adds the LoRA to the dequantised ones."""
    model = load(sd3.folder, loras=(), prompt=load_prompt(sd3.embeddings), device=CPU, dtype=torch.float32)
    path = write(host, model, "eight-bit-base", False, "float8")
    graph = Graph()
    loader = load_node(graph, path)
    lora = graph.add(
        "TSDSRLoadLora", model=(loader, 0), vae=(loader, 1), transformer_lora="tsdsr/transformer.safetensors",
        vae_lora="tsdsr/vae.safetensors", transformer_strength=1.0, vae_strength=0.0, vae_precision="fp32",
    )  # fmt: skip
    plain, patched = (upscale(graph, loader, (node, 0), "patched") for node in (loader, lora))
    result = host.run(graph)
    assert result.status == "success", result.error
    model = from_bundle(read_bundle(path), CPU, torch.float32)
    merge_lora(model.transformer, load_lora(sd3.loras / "transformer.safetensors"))
    exact = np.floor(core(host, model).permute(1, 2, 0).numpy() * 255)
    plain, patched = (result.pictures(save)[0].astype(int) for save in (plain, patched))
    effect, error = np.abs(plain - exact).mean(), np.abs(patched - exact).mean()
    assert 0 < error < 0.2 * effect, "the LoRA is there, rounded"


def test_saving_it_again_is_one_error(bundle, host):
    path, folded = bundle
    graph = Graph()
    loader = load_node(graph, path)
    graph.add(
        "TSDSRSaveCheckpoint", model=(loader, 0), vae=(loader, 1), conditioning=(loader, 2), filename_prefix="x", dtype="fp16"
    )
    result = host.run(graph)
    assert result.status == "error"
    message = "this checkpoint is folded, which cannot be saved again" if folded else "the model is quantised"
    assert message in result.error
    assert len(result.error.strip().splitlines()) == 1
