"""Latents that the host's own nodes changed: TSD-SR Decode never cuts them wrongly.

The oracle is the host's VAE Decode, which gives the same latent with its padding, cut by hand.
"""

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tsdsr_core.families.bundle import write_bundle
from tsdsr_core.families.load import load, merged_bundle
from tsdsr_core.images.files import Picture, write_picture

from ...comfyui.graphs import BUILTIN, CPU, TILES, UPSCALE
from ...comfyui.latent_cases import CASES, FAILING, FILES, HOST, OTHER_MODELS, SIZES, Bench, Link, on
from ...support.tiny import photo


@pytest.fixture(scope="module")
def pictures(host) -> dict[str, np.ndarray]:
    """By name, in levels of 8 bits."""
    seeds = {name: seed for seed, name in enumerate(SIZES, 3)}
    for name, seed in seeds.items():
        write_picture(host.base / "input" / FILES[name], Picture(photo(*SIZES[name], seed)))
    return {name: photo(*SIZES[name], seed)[0].permute(1, 2, 0).numpy() * 255 for name, seed in seeds.items()}


@pytest.fixture(scope="module")
def small(host, pictures) -> str:
    """A checkpoint of random weights: the built-in model with one block, and a quick VAE."""
    model = load("builtin", device=CPU, dtype=torch.float32)
    torch.manual_seed(0)
    one_block = {"num_layers": 1, "num_attention_heads": 1, "caption_projection_dim": 64}
    transformer = type(model.transformer)(**{**model.transformer.config, **one_block})
    vae = type(model.vae)(**{**model.vae.config, "block_out_channels": (32, 32, 32), "layers_per_block": 1})
    path = host.base / "models" / "tsdsr" / "small.safetensors"
    write_bundle(path, merged_bundle(transformer, vae, model.prompt, torch.float32, model.defaults, {}))
    return path.name


def run(host, bench: Bench, images: list[Link]) -> list[list[np.ndarray]]:
    """What each of the links gives."""
    saves = [bench.add("SaveImage", images=link, filename_prefix="latents")[0] for link in images]
    result = host.run(bench.graph)
    assert result.status == "success", result.error
    return [[picture.astype(int) for picture in result.pictures(save)] for save in saves]


def both(bench: Bench, latent: Link) -> list[Link]:
    """TSD-SR Decode and VAE Decode."""
    vae = bench.loader, 1
    return [bench.add("TSDSRDecode", latent=latent, vae=vae), bench.add("VAEDecode", samples=latent, vae=vae)]


@pytest.fixture(scope="module")
def lacking(host) -> dict[str, set[str]]:
    """For each case the nodes that it needs and that an older ComfyUI does not have, or not with an output."""
    info = host.get("/object_info")
    known = {name for name, node in info.items() if node["output"]}
    return {name: nodes_of(case.make) - known for name, case in CASES.items()}


def nodes_of(*makes: Callable[[Bench], Link]) -> set[str]:
    bench = Bench(BUILTIN)
    for make in makes:
        make(bench)
    return {node["class_type"] for node in bench.graph.nodes.values()}


@pytest.fixture(scope="module")
def decoded(host, small, lacking) -> dict[str, list[list[np.ndarray]]]:
    """For each case what TSD-SR Decode and what VAE Decode gives, all in one run."""
    bench = Bench(small)
    names = [name for name in CASES if not lacking[name]]
    found = run(host, bench, [link for name in names for link in both(bench, CASES[name].make(bench))])
    return {name: found[2 * index : 2 * index + 2] for index, name in enumerate(names)}


@pytest.mark.parametrize("name", CASES)
def test_a_changed_latent_is_never_cut_wrongly(name, decoded, lacking):
    if lacking[name]:
        pytest.skip(f"this ComfyUI has no such {', '.join(sorted(lacking[name]))}")
    found, padded = decoded[name]
    top, left, height, width = CASES[name].area or (0, 0, *padded[0].shape[:2])
    assert padded[0].std() > 5 or name == "LatentMultiply by nothing"
    for ours, whole in zip(found, padded, strict=True):
        assert ours.shape[:2] == (height, width)
        assert np.abs(ours - whole[top : top + height, left : left + width]).max() <= 1, "rounding to 8 bit"


def test_turned_images_are_seen_without_padding(host, pictures):
    """By the built-in model, which shows what it is given; a cut on another side would not fit the turned image."""
    cases = {name: case for name, case in CASES.items() if case.shows}
    bench = Bench(BUILTIN)
    found = run(host, bench, [both(bench, case.make(bench))[0] for case in cases.values()])
    for (name, case), shown in zip(cases.items(), found, strict=True):
        wanted, turn = case.shows
        for ours, picture in zip(shown, wanted, strict=True):
            assert np.abs(ours - turn(pictures[picture])).mean() < 20, name


@pytest.mark.parametrize("name", FAILING)
def test_what_is_not_the_latent_of_an_image_is_one_message(name, host, small):
    make, message = FAILING[name]
    bench = Bench(small)
    bench.add("SaveImage", images=both(bench, make(bench))[0], filename_prefix="latents")
    result = host.run(bench.graph)
    assert result.status == "error"
    assert message in result.error


def test_a_joint_latent_is_refused_by_the_step(host, small):
    bench = Bench(small)
    bench.add("PreviewAny", source=bench.step(FAILING["LTXVConcatAVLatent"][0](bench)))
    result = host.run(bench.graph)
    assert result.status == "error"
    assert "expected floats of (batch, 16, height, width)" in result.error


def test_a_reloaded_latent_keeps_its_padding(host, small):
    bench = Bench(small)
    on("a", "SaveLatent", filename_prefix="latents/reloaded")(bench)
    result = host.run(bench.graph)
    assert result.status == "success", result.error
    saved = next((host.base / "output" / "latents").glob("reloaded*.latent"))
    shutil.copy(saved, host.base / "input" / "reloaded.latent")
    bench = Bench(small)
    (ours,), (padded,) = run(host, bench, both(bench, bench.add("LoadLatent", latent="reloaded.latent")))
    assert ours.shape[:2] == (48, 56)
    assert np.abs(ours - padded).max() <= 1, "rounding to 8 bit"


def test_a_compiled_model_gives_what_the_plain_one_gives(host, small):
    """TorchCompileModel before our nodes; with its other backend, which leaves out compiling C++ on the CPU."""
    bench, images = Bench(small), []
    plain = bench.loader, 0
    for model in (plain, bench.add("TorchCompileModel", model=plain, backend="cudagraphs")):
        prompt = {"model": model, "conditioning": (bench.loader, 2)}
        step = bench.add("TSDSROneStep", latent=bench.latent("a"), strength=1.0, **prompt, **TILES)
        images.append(bench.add("TSDSRDecode", latent=step, vae=(bench.loader, 1)))
        size = {"size": "scale by", "size.factor": 1.0}
        images.append(
            bench.add("TSDSRUpscale", image=bench.image("a"), vae=(bench.loader, 1), **prompt, **size, **{**UPSCALE, **TILES})
        )
    step, upscale, compiled_step, compiled_upscale = run(host, bench, images)
    assert np.abs(compiled_step[0] - step[0]).max() <= 1, "rounding to 8 bit"
    assert np.abs(compiled_upscale[0] - upscale[0]).max() <= 1, "rounding to 8 bit"


def passes_latents_on(node: dict[str, Any]) -> bool:
    """Whether a node of ``/object_info`` takes and gives a LATENT, be it as one of several types."""
    inputs = [kind for group in ("required", "optional") for kind in node["input"].get(group, {}).values()]
    return takes_latent(inputs) and any(output in ("LATENT", "COMFY_MATCHTYPE_V3") for output in node["output"])


def takes_latent(inputs: Any) -> bool:
    if isinstance(inputs, dict):
        types = inputs.get("allowed_types", "")
        return types == "*" or "LATENT" in types.split(",") or any(takes_latent(value) for value in inputs.values())
    if isinstance(inputs, list):
        return any(takes_latent(value) for value in inputs)
    return inputs == "LATENT"


def test_the_table_knows_every_node_that_passes_latents_on(host):
    version = host.get("/system_stats")["system"]["comfyui_version"]
    if version != HOST:
        pytest.skip(f"the table is of {HOST}, this is {version}")
    info = host.get("/object_info")
    stock = {name for name, node in info.items() if passes_latents_on(node) and "custom_nodes" not in node["python_module"]}
    used = nodes_of(*(case.make for case in CASES.values()), *(make for make, _ in FAILING.values()))
    assert stock - used == OTHER_MODELS
