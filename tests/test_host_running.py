"""Memory, cancelling and repeating in a real ComfyUI."""

import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest

from tsdsr_core.bundle import BUILTIN as BUILTIN_FILE
from tsdsr_core.bundle import read_bundle, write_bundle

from .host import Graph
from .host_graphs import BUILTIN, TILES, builtin_graph, load_sd3


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
        "out of memory with 4 tiles at once; going on with 2",
        "out of memory with 2 tiles at once; going on with 1",
        "out of memory with one tile of 32 latent cells; going on with 16",
        "out of memory with 4 tiles at once; going on with 2",
        "out of memory with 2 tiles at once; going on with 1",
    ]
    difference = np.abs(whole.pictures(plain)[0].astype(int) - result.pictures(forced)[0])
    assert 0 < difference.mean() < 3, "smaller tiles see less, and give nearly the same"


def test_no_memory_at_all_is_one_error_that_says_what_to_do(host):
    graph, _ = builtin_graph()
    through_a_wrapper(graph, cells=1, log="")
    error = host.run(graph).error
    assert "out of memory with one tile of 16 latent cells, the least there is: close other programs" in error
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


@pytest.mark.parametrize("stage", ["TSDSREncode", "TSDSRDecode"])
def test_a_vae_that_overflows_is_named(stage, host):
    """In fp16, before another node meets its NaNs; fp32 is what the message advises."""
    bundle = read_bundle(BUILTIN_FILE)
    half = {"TSDSREncode": "encoder", "TSDSRDecode": "decoder"}[stage]
    name = f"{half}.conv_in.weight"
    loud = {**bundle.vae, name: bundle.vae[name].float() * 1e5}
    write_bundle(host.base / "models" / "tsdsr" / "loud.safetensors", replace(bundle, vae=loud))
    for precision in ("fp16", "fp32"):
        graph = Graph()
        loader = graph.add("TSDSRLoadCheckpoint", checkpoint="loud.safetensors", vae_precision=precision)
        image = (graph.add("LoadImage", image="photo.png"), 0)
        given = {"image": image} if half == "encoder" else {"latent": (graph.add("TestOddLatent", channels=16), 0)}
        result = graph.add(stage, vae=(loader, 1), **given)
        graph.add("PreviewAny", source=(result, 0))
        found = host.run(graph)
        assert found.status == ("error" if precision == "fp16" else "success"), found.error
        assert ("the VAE overflowed: choose vae_precision fp32" in found.error) == (precision == "fp16")


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
