"""Memory, cancelling and repeating in a real ComfyUI."""

import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest

from tsdsr_core.families.bundle import BUILTIN as BUILTIN_FILE
from tsdsr_core.families.bundle import read_bundle, write_bundle

from ...comfyui.graphs import BUILTIN, TILES, builtin_graph, load_sd3
from ...comfyui.host import Graph


def through_a_wrapper(graph: Graph, **settings) -> None:
    """Let the model of the graph's TSDSRUpscale run through the test pack's wrapper."""
    upscale = next(node for node in graph.nodes.values() if node["class_type"] == "TSDSRUpscale")
    upscale["inputs"]["model"] = [graph.add("TestWrapped", model=tuple(upscale["inputs"]["model"]), **settings), 0]


def test_out_of_memory_makes_batches_and_tiles_smaller(host):
    settings = {"size.factor": 4.0, "tile": 32, "tile_overlap": 8}
    graph, plain = builtin_graph(**settings)
    whole = host.run(graph)
    graph, forced = builtin_graph(**settings)
    through_a_wrapper(graph, cells=16 * 16, log="")
    before = len(host.log.read_text())
    result = host.run(graph)
    assert result.status == "success", result.error
    said = re.findall(r"out of memory with .*", host.log.read_text()[before:])
    assert said == [
        "out of memory with 4 tiles at once; continuing with 2",
        "out of memory with 2 tiles at once; continuing with 1",
        "out of memory with one tile of 32 latent cells; continuing with 16",
        "out of memory with 4 tiles at once; continuing with 2",
        "out of memory with 2 tiles at once; continuing with 1",
    ]
    difference = np.abs(whole.pictures(plain)[0].astype(int) - result.pictures(forced)[0])
    assert 0 < difference.mean() < 3, "smaller tiles see less, and give nearly the same"
    assert report(whole, graph)[0] == "52x44 → 208x176, 4 tiles of 32x32, batch 4"
    assert report(result, graph)[0] == "52x44 → 208x176, 16 tiles of 16x16, batch 1"


def report(result, graph: Graph) -> list[str]:
    """The lines that the graph's TSDSRUpscale shows."""
    upscale = next(name for name, node in graph.nodes.items() if node["class_type"] == "TSDSRUpscale")
    return result.outputs[upscale]["text"][0].split(";\n")


LEVELS = read_bundle(BUILTIN_FILE).defaults["wavelet_levels"]
COST = r"encode \d+\.\d, step \d+\.\d, decode \d+\.\d, colour \d+\.\d s; peak \d+\.\d GB"


@pytest.mark.parametrize(
    ("image", "changes", "expected"),
    [
        ("photo.png", {}, ["52x44 → 104x88, one tile", COST, f"automatic: wavelet_levels {LEVELS}"]),
        (
            "large.png", {"size.factor": 1.0},
            [
                "512x512 → 512x512, 4 tiles of 68x68, batch 4", COST,
                f"automatic: tile, tile_batch, wavelet_levels {LEVELS}",
            ],
        ),
        (
            "photo.png", {"tile": 16, "tile_batch": 3, "color_fix": "adain", "strength": 0.9},
            ["52x44 → 104x88, 6 tiles of 16x16, batch 3", COST],
        ),
    ],
)  # fmt: skip
def test_the_upscaler_reports_sizes_tiles_seconds_memory_and_what_was_automatic(image, changes, expected, host):
    graph, _ = builtin_graph(image, **changes)
    result = host.run(graph)
    assert result.status == "success", result.error
    lines = report(result, graph)
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line)
    assert 0.3 < float(lines[1].split()[-2]) < 3 * host.memory() / 1e9, "GB of the process"


def test_no_memory_at_all_is_one_error_that_says_what_to_do(host):
    graph, _ = builtin_graph()
    through_a_wrapper(graph, cells=1, log="")
    error = host.run(graph).error
    assert "out of memory with one tile of 16 latent cells, the smallest size: close other programs" in error
    graph, _ = builtin_graph(strength=0.9)
    assert host.run(graph).status == "success"


def test_cancel_takes_effect_within_one_batch_of_tiles(host):
    graph, _ = builtin_graph("large.png", **{"size.factor": 2.0, "tile": 32, "tile_batch": 2})
    through_a_wrapper(graph, cells=10**9, log="batch for cancelling")
    count = lambda: host.log.read_text().count("batch for cancelling")  # noqa: E731
    prompt = host.start(graph)
    deadline = time.monotonic() + 300
    while count() < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    host.post("/interrupt", {})
    reached = count()
    assert host.wait(prompt).status == "interrupted"
    assert count() <= reached + 1
    assert reached < 40, "the run was over before it could be cancelled: it has 50 batches"
    graph, _ = builtin_graph(strength=0.8)
    assert host.run(graph).status == "success"


@pytest.mark.parametrize("stage", ["TSDSREncode", "TSDSRDecode"])
def test_cancel_takes_effect_within_the_vae_too(stage, host):
    """Between its tiles; a whole pass over this picture takes many seconds."""
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    if stage == "TSDSREncode":
        image = graph.add("EmptyImage", width=3072, height=3072, batch_size=1, color=time.monotonic_ns() % 2**24)
        result = graph.add(stage, image=(image, 0), vae=(loader, 1))
    else:
        latent = graph.add("EmptySD3LatentImage", width=6144, height=6144, batch_size=1)
        result = graph.add(stage, latent=(latent, 0), vae=(loader, 1))
    graph.add("PreviewAny", source=(result, 0))
    prompt = host.start(graph)
    time.sleep(2)
    assert host.get("/queue")["queue_running"], "the run was over before it could be cancelled"
    start = time.monotonic()
    host.post("/interrupt", {})
    assert host.wait(prompt).status == "interrupted"
    assert time.monotonic() - start < 3


def loud_vae(host, half: str, factor: float) -> str:
    """The name of a bundle whose VAE is louder inside by ``factor``; group normalisation takes it out again, in fp32."""
    bundle = read_bundle(BUILTIN_FILE)
    layers = [f"{half}.conv_in.weight", f"{half}.conv_in.bias"]
    loud = {**bundle.vae, **{layer: bundle.vae[layer].float() * factor for layer in layers}}
    name = f"loud {half} {factor:g}.safetensors"
    write_bundle(host.base / "models" / "tsdsr" / name, replace(bundle, vae=loud))
    return name


def encoded_and_decoded(name: str, precision: str, image: str = "photo.png") -> tuple[Graph, str]:
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=name, vae_precision=precision)
    latent = graph.add("TSDSREncode", image=(graph.add("LoadImage", image=image), 0), vae=(loader, 1))
    decoded = graph.add("TSDSRDecode", latent=(latent, 0), vae=(loader, 1))
    return graph, graph.add("SaveImage", images=(decoded, 0), filename_prefix="loud")


@pytest.mark.parametrize("half", ["encoder", "decoder"])
@pytest.mark.parametrize(
    ("factor", "said"),
    [(5e4, "the VAE {half} overflowed in float16; running it in fp32 from now on"),
     (1e6, "the VAE has weights beyond float16; running it in fp32")],
)  # fmt: skip
def test_a_vae_that_overflows_in_fp16_runs_in_fp32(half, factor, said, host):
    """What it computes, or its weights themselves."""
    name, before = loud_vae(host, half, factor), len(host.log.read_text())
    (graph, save), (exact, exact_save) = (encoded_and_decoded(name, precision) for precision in ("fp16", "fp32"))
    result = host.run(graph)
    assert result.status == "success", result.error
    again, _ = encoded_and_decoded(name, "fp16", image="lighthouse.png")
    assert host.run(again).status == "success"
    assert host.log.read_text()[before:].count("running it in fp32") == 1, "the next image goes the same way at once"
    assert said.format(half=half) in host.log.read_text()[before:]
    found, wanted = result.pictures(save)[0], host.run(exact).pictures(exact_save)[0]
    assert wanted.std() > 5
    assert np.abs(found.astype(int) - wanted).max() <= 4


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_a_vae_that_overflows_in_fp32_is_named(half, host):
    graph, _ = encoded_and_decoded(loud_vae(host, half, 1e38), "fp32")
    error = host.run(graph).error
    assert f"the result of the VAE {half} in fp32 is not finite" in error
    assert len(error.strip().splitlines()) == 1


def test_a_transformer_that_overflows_is_named(host):
    bundle = read_bundle(BUILTIN_FILE)
    last = bundle.transformer["proj_out.weight"].double()
    largest = (last * (3e38 / last.abs().max())).float()  # that fp32 holds
    loud = {**bundle.transformer, "proj_out.weight": largest}
    write_bundle(host.base / "models" / "tsdsr" / "loud transformer.safetensors", replace(bundle, transformer=loud))
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint="loud transformer.safetensors", vae_precision="auto")
    builtin_graph(graph=graph, model=(loader, 0))
    assert "the result of the transformer is not finite" in host.run(graph).error


def test_a_tile_cut_to_what_the_model_sees_keeps_the_share_that_overlaps(host):
    """Tiles of 128 cells that overlap by 42, not by 126: 4 of them, not 289."""
    graph, _ = builtin_graph("large.png", **{"size.factor": 1.25, "tile": 384, "tile_overlap": 128, "tile_batch": 1})
    through_a_wrapper(graph, cells=10**9, log="one tile of the wide overlap")
    result = host.run(graph)
    assert result.status == "success", result.error
    assert host.log.read_text().count("one tile of the wide overlap") == 4


def census(host) -> dict[str, int]:
    """What the server's process holds."""
    graph = Graph()
    node = graph.add("TestCensus", seed=time.monotonic_ns() % 2**31)
    result = host.run(graph)
    assert result.status == "success", result.error
    return json.loads(result.outputs[node]["text"][0])


def lora_graph(strength: float, channels: int = 16) -> Graph:
    """SD3 with both LoRAs: one step on a small latent, then the decoder."""
    graph = Graph()
    lora, prompt = load_sd3(graph)
    latent = graph.add("TestOddLatent", channels=channels)
    step = graph.add("TSDSROneStep", model=(lora, 0), conditioning=(prompt, 0), latent=(latent, 0), strength=strength, **TILES)
    picture = graph.add("TSDSRDecode", latent=(step, 0), vae=(lora, 1))
    graph.add("PreviewImage", images=(picture, 0))
    return graph


def test_running_again_neither_patches_nor_loads_again(host, sd3):
    log = len(host.log.read_text())
    assert host.run(lora_graph(1.0)).status == "success"
    first = host.log.read_text()[log:]
    assert first.count("patching ") > 0
    assert "Requested to load" in first
    for index in range(3):
        assert host.run(lora_graph(0.9 - index / 10)).status == "success"
    later = host.log.read_text()[log + len(first) :]
    assert later.count("patching ") == 0
    assert "Requested to load" not in later


def test_fifty_runs_with_errors_between_them_do_not_grow(host, sd3):
    found = []
    for index in range(50):
        failing = index % 5 == 4
        result = host.run(lora_graph(1 - index / 1000, channels=4 if failing else 16))
        assert result.status == ("error" if failing else "success"), result.error
        if index in (9, 49):
            found.append(census(host))
    first, last = found
    assert last["models"] <= first["models"]
    assert last["tensors"] <= first["tensors"] + 8
    assert last["bytes"] <= first["bytes"] + 100_000, "one decoded picture has 49 KB"


@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_the_host_is_asked_for_one_batch_of_tiles(scale, host):
    """Not for the whole latent: what is asked does not grow with the picture."""
    graph, _ = builtin_graph(**{"size.factor": scale, "tile": 16, "tile_batch": 2})
    before = len(host.log.read_text())
    through_a_wrapper(graph, cells=10**9, log="")
    assert host.run(graph).status == "success"
    assert re.findall(r"asked for memory for (\(.*\))", host.log.read_text()[before:]) == ["(2, 16, 16, 16)"]
