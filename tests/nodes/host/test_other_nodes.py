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


def stepped(change, tile_batch: int = 0) -> tuple[Graph, str]:
    """The step on 20 tiles of an image, after ``change(graph, model, conditioning)`` has given both anew; and its picture."""
    graph = Graph()
    loader = builtin(graph)
    image = graph.add("ImageScale", image=(graph.add("LoadImage", image="photo.png"), 0), upscale_method="bicubic", width=256,
                      height=192, crop="disabled")  # fmt: skip
    latent = graph.add("TSDSREncode", image=(image, 0), vae=(loader, 1))
    model, conditioning = change(graph, (loader, 0), (loader, 2))
    step = graph.add("TSDSROneStep", model=model, conditioning=conditioning, latent=(latent, 0), strength=1.0,
                     **{**TILES, "tile_batch": tile_batch})  # fmt: skip
    decoded = graph.add("TSDSRDecode", latent=(step, 0), vae=(loader, 1))
    return graph, graph.add("SaveImage", images=(decoded, 0), filename_prefix="stepped")


def weighted(graph: Graph, conditioning: tuple, strength: float) -> tuple:
    return graph.add("ConditioningSetAreaStrength", conditioning=conditioning, strength=strength), 0


def ranged(graph: Graph, conditioning: tuple, start: float, end: float) -> tuple:
    return graph.add("ConditioningSetTimestepRange", conditioning=conditioning, start=start, end=end), 0


def both(graph: Graph, first: tuple, second: tuple) -> tuple:
    return graph.add("ConditioningCombine", conditioning_1=first, conditioning_2=second), 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda graph, c: weighted(graph, c, 0.0), "the strength of the conditioning is 0"),
        (lambda graph, c: both(graph, *[weighted(graph, c, 0.0)] * 2), "the strength of the conditioning is 0"),
        (
            lambda graph, c: both(graph, weighted(graph, c, 0.0), ranged(graph, c, 0.5, 1.0)),
            "the strength of the conditioning is 0",
        ),
        (lambda graph, c: ranged(graph, c, 0.5, 1.0), "the timestep range of the conditioning leaves out the start"),
        (
            lambda graph, c: (graph.add("ConditioningSetArea", conditioning=c, width=64, height=64, x=0, y=0, strength=1.0), 0),
            "the conditioning has 'area'",
        ),
        (
            lambda graph, c: (
                graph.add("ConditioningSetMask", conditioning=c, strength=1.0, set_cond_area="default",
                          mask=(graph.add("SolidMask", value=1.0, width=64, height=64), 0)), 0,
            ),
            "the conditioning has 'mask'",
        ),
    ],
)  # fmt: skip
def test_a_conditioning_that_is_not_for_the_whole_image_is_one_sentence(change, message, host):
    assert message in fail(host, stepped(lambda graph, model, c: (model, change(graph, c)))[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda graph, c: weighted(graph, c, 0.3),
        lambda graph, c: both(graph, c, weighted(graph, c, 0.0)),
        lambda graph, c: both(graph, c, ranged(graph, c, 0.5, 1.0)),
        lambda graph, c: both(graph, c, weighted(graph, c, 2.0)),
        lambda graph, c: ranged(graph, c, 0.0, 0.5),
    ],
)
def test_weights_of_one_prompt_change_nothing(change, host):
    """The host averages by strength, so that one prompt gives itself however it is weighted."""
    pictures = []
    for each in (lambda graph, c: c, change):
        graph, save = stepped(lambda graph, model, c, each=each: (model, each(graph, c)))
        pictures.append(succeed(host, graph).pictures(save)[0].astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


WHOLE_LATENT = {
    "RenormCFG": {"cfg_trunc": 100.0, "renorm_cfg": 1.0},
    "TemporalScoreRescaling": {"tsr_k": 0.95, "tsr_sigma": 1.0},
    "ContextWindowsManual": {
        "context_length": 8, "context_overlap": 2, "context_schedule": "standard_static", "context_stride": 1,
        "closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": False, "latent_retain_index_list": "",
        "cond_retain_index_list": "", "split_conds_to_windows": False, "causal_window_fix": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("node", WHOLE_LATENT)
def test_nodes_that_look_at_the_whole_latent_get_one_tile_at_a_time(node, host):
    if node not in host.get("/object_info"):
        pytest.skip(f"this host has no {node}")
    known = host.get("/object_info")[node]["input"]
    known = {*known["required"], *known.get("optional", {})}
    inputs = {name: value for name, value in WHOLE_LATENT[node].items() if name in known}
    pictures = []
    for tile_batch in (0, 1):
        graph, save = stepped(lambda graph, model, c: ((graph.add(node, model=model, **inputs), 0), c), tile_batch)
        pictures.append(succeed(host, graph).pictures(save)[0].astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("scheduler", ["ddim_uniform", "kl_optimal"])
def test_a_scheduler_with_other_sigmas_is_named(scheduler, host):
    graph = Graph()
    loader = builtin(graph)
    if scheduler not in host.get("/object_info/BasicScheduler")["BasicScheduler"]["input"]["required"]["scheduler"][-1].get(
        "options", [scheduler]
    ):
        pytest.skip(f"this host has no {scheduler}")
    sigmas = graph.add("BasicScheduler", model=(loader, 0), scheduler=scheduler, steps=1, denoise=1.0)
    latent = graph.add("TestOddLatent", channels=16)
    guider = graph.add("BasicGuider", model=(loader, 0), conditioning=(loader, 2))
    sampled = graph.add(
        "SamplerCustomAdvanced", noise=(graph.add("DisableNoise"), 0), guider=(guider, 0), sigmas=(sigmas, 0),
        sampler=(graph.add("TSDSRSampler", strength=1.0, **TILES), 0), latent_image=(latent, 0),
    )  # fmt: skip
    graph.add("PreviewAny", source=(sampled, 0))
    assert "the scheduler simple" in fail(host, graph)


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
