"""What memory there is, previews and compiled autoencoders, in a real ComfyUI."""

import re

import numpy as np
import pytest
import torch

from tsdsr_core.families.load import load
from tsdsr_core.vae.plan import plan_tiles
from tsdsr_core.vae.program import decoder_program, encoder_program

from ...comfyui.graphs import BUILTIN, UPSCALE, builtin_graph, load_sd3, stages
from ...comfyui.host import Graph
from .test_running import encoded_and_decoded, loud_vae, through_a_wrapper


def logged(host, graph: Graph, pattern: str) -> tuple:
    """The result of a graph, and what the server's log says of it."""
    before = len(host.log.read_text())
    result = host.run(graph)
    return result, re.findall(pattern, host.log.read_text()[before:])


def saved(host, graph: Graph, node: str) -> np.ndarray:
    """The picture that a SaveImage node of a graph writes."""
    result = host.run(graph)
    assert result.status == "success", result.error
    return result.pictures(node)[0]


def sides(previews: list[str]) -> list[int]:
    return [int(side) for shape in previews for side in shape.split(", ")[2:]]


PREVIEW = r"preview of \((.*)\)"


def sampled(fail: bool) -> tuple[Graph, list[str]]:
    """The sampler's way on 128x128 latents, with both of its results saved."""
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    image = graph.add("LoadImage", image="large.png")
    latent = graph.add("TSDSREncode", image=(image, 0), vae=(loader, 1))
    model = graph.add("TestPreviews", model=(loader, 0), fail=fail)
    sigmas = graph.add("BasicScheduler", model=(model, 0), scheduler="simple", steps=1, denoise=1.0)
    guider = graph.add("BasicGuider", model=(model, 0), conditioning=(loader, 2))
    sampler = graph.add("TSDSRSampler", strength=1.0, tile=64, tile_overlap=8, tile_batch=2)
    step = graph.add(
        "SamplerCustomAdvanced", noise=(graph.add("DisableNoise"), 0), guider=(guider, 0), sampler=(sampler, 0),
        sigmas=(sigmas, 0), latent_image=(latent, 0),
    )  # fmt: skip
    saves = []
    for output in (0, 1):
        decoded = graph.add("TSDSRDecode", latent=(step, output), vae=(loader, 1))
        saves.append(graph.add("SaveImage", images=(decoded, 0), filename_prefix="sampled"))
    return graph, saves


@pytest.mark.parametrize("fail", [False, True])
def test_previews_of_the_sampler_are_small_and_end_no_run(fail, host):
    """The last one too, of which the host keeps the whole as the denoised output."""
    graph, saves = sampled(fail)
    result, previews = logged(host, graph, PREVIEW)
    host.run(sampled(fail=False)[0])
    assert result.status == "success", result.error
    assert len(previews) >= 2
    assert max(sides(previews)) <= 64
    output, denoised = (result.pictures(save)[0] for save in saves)
    assert output.shape == denoised.shape == (512, 512, 3)
    assert np.array_equal(output, denoised)


@pytest.mark.parametrize("node", ["TSDSRUpscale", "TSDSROneStep"])
def test_previews_of_our_nodes_are_small_too(node, host):
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    if node == "TSDSRUpscale":
        image = graph.add("LoadImage", image="large.png")
        given = {"image": (image, 0), "vae": (loader, 1), "size": "scale by", "size.factor": 1.1, **UPSCALE}
    else:
        latent = graph.add("EmptySD3LatentImage", width=1040, height=808, batch_size=1)
        given = {"latent": (latent, 0), "strength": 1.0, "tile_batch": 0, "tile": 64, "tile_overlap": 8}
    result = graph.add(node, model=(loader, 0), conditioning=(loader, 2), **given)
    graph.add("PreviewAny", source=(result, 0))
    result, previews = logged(host, graph, PREVIEW)
    assert result.status == "success", result.error
    assert 32 <= max(sides(previews)) <= 64


def unlimited(host) -> None:
    """Let the host see the memory there is again."""
    graph = Graph()
    image = graph.add("EmptyImage", width=32, height=32, batch_size=1, color=2)
    graph.add("PreviewImage", images=(graph.add("TestFreeMemory", image=(image, 0), megabytes=0), 0))
    assert host.run(graph).status == "success"


def refused_for_memory(host, side: int, megabytes: int, **given) -> None:
    """Upscale with that much free memory: an error says so before the step runs."""
    graph = Graph()
    image = graph.add("EmptyImage", width=side, height=side, batch_size=1, color=1)
    image = graph.add("TestFreeMemory", image=(image, 0), megabytes=megabytes)
    if given:
        loader = graph.add("TSDSRLoadCheckpoint", **given)
        given = {"model": (loader, 0), "vae": (loader, 1), "conditioning": (loader, 2)}
    graph, _ = builtin_graph((image, 0), graph, **given)
    through_a_wrapper(graph, cells=10**9, log="the step runs")
    try:
        result, runs = logged(host, graph, "the step runs")
    finally:
        unlimited(host)
    assert re.search(r"the VAE needs .* GB of memory for an image of this size, .* GB are free", result.error)
    assert not runs


def test_too_little_memory_for_decoding_is_said_before_any_work(host):
    """Enough to encode and for the step; what the host keeps is asked for before that is said."""
    vae = load("builtin", device=torch.device("cpu"), dtype=torch.float32).vae
    encoder, decoder = (
        plan_tiles([op.spec for op in program(vae)], side, side, 4).device_bytes
        for program, side in ((encoder_program, 512), (decoder_program, 128))
    )
    assert decoder > 1.1 * encoder
    refused_for_memory(host, 256, (encoder + decoder) // 2 // 10**6)


def test_a_half_known_to_run_in_fp32_is_asked_for_in_fp32(host):
    """Memory enough for the decoder in the type of its weights, but not in that which it runs in since it overflowed."""
    name = loud_vae(host, "decoder", 5e4)
    graph, _ = encoded_and_decoded(name, "fp16")
    result, said = logged(host, graph, "the VAE decoder overflowed in float16")
    assert result.status == "success", result.error
    assert said
    vae = load("builtin", device=torch.device("cpu"), dtype=torch.float32).vae
    half, whole = (plan_tiles([op.spec for op in decoder_program(vae)], 256, 256, size).device_bytes for size in (2, 4))
    refused_for_memory(host, 512, (half + whole) // 2 // 10**6, checkpoint=name, vae_precision="fp16")


@pytest.mark.parametrize("when", ["before the LoRA", "after the LoRA"])
def test_a_compiled_vae_gives_what_it_gave_before(when, host, sd3):
    """With its LoRA; the names of compiled weights are others, and the host leaves out patches that it finds no weight for."""
    graph = Graph()
    lora, prompt = load_sd3(graph)
    plain = saved(host, graph, stages(graph, (lora, 0), (lora, 1), (prompt, 0), "plain"))
    graph = Graph()
    lora, prompt = load_sd3(graph, vae_strength=0.999 if when == "before the LoRA" else 0.998)  # or the host shows what it kept
    vae = lora
    if when == "before the LoRA":
        source = graph.nodes[lora]["inputs"]["vae"]
        graph.nodes[lora]["inputs"]["vae"] = [graph.add("TestSwitchedVae", vae=tuple(source), compiled=True), 0]
        vae = (lora, 1)
    else:
        vae = (graph.add("TestSwitchedVae", vae=(lora, 1), compiled=True), 0)
    try:
        compiled = saved(host, graph, stages(graph, (lora, 0), vae, (prompt, 0), "compiled"))
    finally:
        for node in graph.nodes.values():
            if node["class_type"] == "TestSwitchedVae":
                node["inputs"]["compiled"] = False
        assert host.run(graph).status == "success"
    assert np.abs(plain.astype(int) - compiled).max() <= 2, "the strength differs a little"
    assert plain.std() > 5
