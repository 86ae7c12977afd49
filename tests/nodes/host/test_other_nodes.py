"""Stock nodes beside this pack's: what they save, what they keep, and what they hand over, in a real ComfyUI."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tsdsr_core.families.bundle import read_bundle

from ...comfyui.graphs import BUILTIN, TILES, load_sd3, stages
from ...comfyui.host import Graph
from ...comfyui.latent_cases import Bench
from .test_bad_input import fold_builtin
from .test_files import builtin, fail, save_builtin, succeed


def vae_in(path) -> dict[str, torch.Tensor]:
    """The VAE of a file that the host saved."""
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        start = "first_stage_model." if any(key.startswith("first_stage_model.") for key in keys) else ""
        return {key.removeprefix(start): file.get_tensor(key) for key in keys if key.startswith(start)}


def test_the_vae_that_a_lora_was_loaded_onto_is_saved_without_it(host, sd3):
    """Also after a run, when the patches of the copy lie in the weights that both share."""
    graph = Graph()
    lora, prompt = load_sd3(graph, vae_precision="fp32")
    stages(graph, (lora, 0), (lora, 1), (prompt, 0), "run")
    succeed(host, graph)
    vae, model = (tuple(graph.nodes[lora]["inputs"][name]) for name in ("vae", "model"))
    graph.add("VAESave", vae=vae, filename_prefix="plain/vae")
    clip = graph.add("CheckpointLoaderSimple", ckpt_name="sd3_medium_incl_clips.safetensors")
    graph.add("CheckpointSave", model=model, clip=(clip, 1), vae=vae, filename_prefix="plain/checkpoint")
    succeed(host, graph)
    fresh = Graph()
    loaded = fresh.add("VAELoader", vae_name="sd3.safetensors")
    fresh.add("VAESave", vae=(loaded, 0), filename_prefix="plain/fresh")
    succeed(host, fresh)
    folder = host.base / "output" / "plain"
    expected = vae_in(folder / "fresh_00001_.safetensors")
    for name in ("vae", "checkpoint"):
        found = vae_in(folder / f"{name}_00001_.safetensors")
        assert found.keys() == expected.keys()
        assert max(float((found[key].float() - expected[key].float()).abs().max()) for key in expected) < 1e-5


def test_what_the_host_could_not_load_again_is_not_saved_by_it(host):
    graph = Graph()
    graph.add("VAESave", vae=(builtin(graph), 1), filename_prefix="refused/vae")
    assert "save it with TSD-SR Save Checkpoint" in fail(host, graph)
    graph = Graph()
    graph.add("ModelSave", model=(fold_builtin(host, graph), 0), filename_prefix="refused/model")
    assert "this model is folded" in fail(host, graph)
    assert not list((host.base / "output" / "refused").glob("*.safetensors"))


def test_a_saved_file_gets_no_name_that_the_loader_finds_elsewhere(host):
    graph = Graph()
    node = save_builtin(graph, "checkpoints/moved")
    shown = succeed(host, graph).outputs[node]["text"][0]
    assert shown == "checkpoints/moved_00001_.safetensors"
    shutil.move(host.base / "output" / shown, host.base / "models" / "tsdsr" / "moved_00001_.safetensors")
    graph = Graph()
    node = save_builtin(graph, "checkpoints/moved")
    graph.nodes[node]["inputs"]["dtype"] = "fp16"
    assert succeed(host, graph).outputs[node]["text"][0] == "checkpoints/moved_00002_.safetensors"


def test_a_replaced_file_whose_name_comes_over_a_link_is_read_again(host):
    folder = host.base / "models" / "tsdsr"
    tokens = []
    graph = Graph()
    name = graph.add("TestText", text="linked_prompt_embeds.pt")
    loader = graph.add("TSDSRLoadPrompt", prompt=(name, 0))
    node = save_builtin(graph, "linked/x", (loader, 0))
    for value in (1.0, 2.0):
        torch.save(torch.full((1, 3, 64), value), folder / "linked_prompt_embeds.pt")
        torch.save(torch.zeros(1, 64), folder / "linked_pool_embeds.pt")
        shown = succeed(host, graph).outputs[node]["text"][0]
        tokens.append(float(read_bundle(host.base / "output" / shown).prompt.tokens.mean()))
    assert tokens == [1.0, 2.0]


def test_lazy_cache_is_refused(host):
    """It would use the result of one tile for others."""
    graph = Graph()
    loader = builtin(graph)
    cache = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    cached = graph.add("LazyCache", model=(loader, 0), **cache)
    latent = graph.add("TestOddLatent", channels=16)
    step = graph.add("TSDSROneStep", model=(cached, 0), conditioning=(loader, 2), latent=(latent, 0), strength=1.0, **TILES)
    graph.add("PreviewAny", source=(step, 0))
    assert "LazyCache re-uses results" in fail(host, graph)


@pytest.mark.parametrize("kind", ["nan", "bool", "empty", "whole numbers", "text"])
def test_a_noise_mask_that_is_none_is_one_sentence(kind, host):
    assert "the latent's noise mask" in fail(host, masked(kind)[0])


def test_a_noise_mask_is_clipped(host):
    """Beyond 0..1 it would change the strength, or reverse it."""
    pictures = []
    for kind in ("5", "-5"):
        graph, save = masked(kind)
        pictures.append(succeed(host, graph).pictures(save)[0].astype(int))
    for covered, expected in ((None, pictures[0]), (0.0, pictures[1])):
        graph, save = masked(None, covered)
        assert np.abs(succeed(host, graph).pictures(save)[0].astype(int) - expected).max() <= 1


def masked(kind: str | None, covered: float | None = None) -> tuple[Graph, str]:
    """Encode, the step under a mask, decode; and the node that saves the picture."""
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    latent = graph.add("TSDSREncode", image=(graph.add("LoadImage", image="photo.png"), 0), vae=(loader, 1))
    if kind:
        latent = graph.add("TestOddMask", latent=(latent, 0), kind=kind)
    elif covered is not None:
        mask = graph.add("SolidMask", value=covered, width=64, height=64)
        latent = graph.add("SetLatentNoiseMask", samples=(latent, 0), mask=(mask, 0))
    step = graph.add("TSDSROneStep", model=(loader, 0), conditioning=(loader, 2), latent=(latent, 0), strength=1.0, **TILES)
    decoded = graph.add("TSDSRDecode", latent=(step, 0), vae=(loader, 1))
    return graph, graph.add("SaveImage", images=(decoded, 0), filename_prefix="masked")


@pytest.mark.parametrize("way", ["node", "sampler"])
@pytest.mark.parametrize("size", [(44, 52), (88, 104), (22, 26)])
def test_a_noise_mask_of_a_padded_image_lies_where_the_image_does(size, way, host):
    """The image has 13 of 14 columns of cells; the mask begins with the tenth of them, in an image of any size."""
    bench = Bench(BUILTIN)
    height, width = size
    black = bench.add("SolidMask", value=0.0, width=width, height=height)
    right = bench.add("SolidMask", value=1.0, width=width - 10 * width // 13, height=height)
    mask = bench.add("MaskComposite", destination=black, source=right, x=10 * width // 13, y=0, operation="add")
    step = bench.step if way == "node" else bench.sampled
    whole = step(bench.latent("a"))
    masked = step(bench.add("SetLatentNoiseMask", samples=bench.latent("a"), mask=mask))
    said = [bench.graph.add("TestChange", one=masked, other=other) for other in (bench.latent("a"), whole)]
    outputs = succeed(host, bench.graph).outputs
    (_, acted), (_, missing) = (json.loads(outputs[node]["text"][0]) for node in said)
    last, first = (10, 10) if way == "node" else (9, 11)  # the host has blurred its edge by a cell on either side
    assert max(acted[:last]) < 1e-5
    assert max(missing[first:]) < 1e-5
    assert acted[9] < missing[9]
    assert acted[10] > missing[10]
