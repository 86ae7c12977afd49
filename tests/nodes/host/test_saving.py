"""TSD-SR Save Checkpoint behind other nodes, in a real ComfyUI: the file gives what the graph gave, or a message says why."""

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ...comfyui.graphs import load_sd3, stages
from ...comfyui.host import Graph
from .test_files import builtin, fail, succeed


def save(graph: Graph, model: tuple, vae: tuple, conditioning: tuple, prefix: str = "checkpoints/behind") -> str:
    given = {"model": model, "vae": vae, "conditioning": conditioning}
    return graph.add("TSDSRSaveCheckpoint", **given, filename_prefix=prefix, dtype="fp32")


@pytest.mark.parametrize("node", ["ModelMergeSimple", "ModelMergeAdd"])
def test_a_merge_with_another_position_table_is_saved_as_it_ran(node, host, sd3):
    """ComfyUI merges parameters alone, and the table is a buffer."""
    weights = load_file(host.base / "models" / "diffusion_models" / "sd3.safetensors")
    weights["pos_embed.pos_embed"] = weights["pos_embed.pos_embed"].flip(1)
    weights["proj_out.weight"] = 0.5 * weights["proj_out.weight"]
    save_file(weights, host.base / "models" / "diffusion_models" / "sd3_other.safetensors")
    graph = Graph()
    lora, prompt = load_sd3(graph)
    other = graph.add("UNETLoader", unet_name="sd3_other.safetensors", weight_dtype="default")
    models = {"model1": tuple(graph.nodes[lora]["inputs"]["model"]), "model2": (other, 0)}
    merged = graph.add(node, **models, **({"ratio": 0.3} if node == "ModelMergeSimple" else {}))
    graph.nodes[lora]["inputs"]["model"] = [merged, 0]
    ran = stages(graph, (lora, 0), (lora, 1), (prompt, 0), "merged")
    file = save(graph, (lora, 0), (lora, 1), (prompt, 0), f"checkpoints/{node}")
    result = succeed(host, graph)
    name = result.outputs[file]["text"][0].removeprefix("checkpoints/")
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=name, vae_precision="fp32")
    again = stages(graph, (loader, 0), (loader, 1), (loader, 2), "merged")
    (found,), (expected,) = succeed(host, graph).pictures(again), result.pictures(ran)
    assert np.abs(found.astype(int) - expected).max() <= 1, "rounding to 8 bit"


@pytest.mark.parametrize("node", ["LoraLoaderBypass", "LoraLoaderBypassModelOnly"])
def test_a_lora_in_bypass_mode_is_one_sentence(node, host, sd3):
    if not host.get(f"/object_info/{node}"):
        pytest.skip("this ComfyUI has no such node")
    graph = Graph()
    loader, prompt = load_sd3(graph)
    given = {"model": (loader, 0), "lora_name": "tsdsr/transformer.safetensors", "strength_model": 1.0}
    if node == "LoraLoaderBypass":
        clip = graph.add("CheckpointLoaderSimple", ckpt_name="sd3_medium_incl_clips.safetensors")
        given |= {"clip": (clip, 1), "strength_clip": 1.0}
    bypassed = graph.add(node, **given)
    save(graph, (bypassed, 0), (loader, 1), (prompt, 0), "bypassed/x")
    assert "another node changes the MODEL while it runs (bypass_lora), as Load LoRA (Bypass) does" in fail(host, graph)
    assert not list((host.base / "output").glob("bypassed/*"))


def test_a_hook_lora_is_one_sentence(host, sd3):
    graph = Graph()
    loader, prompt = load_sd3(graph)
    hook = graph.add("CreateHookLoraModelOnly", lora_name="tsdsr/transformer.safetensors", strength_model=1.0)
    properties = {"hooks": (hook, 0), "strength": 1.0, "set_cond_area": "default"}
    hooked = graph.add("ConditioningSetProperties", cond_NEW=(prompt, 0), **properties)
    save(graph, (loader, 0), (loader, 1), (hooked, 0), "hooked/x")
    assert "the conditioning carries hooks, such as a hook LoRA" in fail(host, graph)
    assert not list((host.base / "output").glob("hooked/*"))


@pytest.mark.parametrize("kind", ["its own class", "bytes", "more in its state dict"])
def test_weights_that_another_pack_quantised_are_one_sentence(kind, host):
    """As the packs for GGUF files keep them, whose class of tensors says how to read its bytes."""
    graph = Graph()
    loader = builtin(graph)
    quantised = graph.add("TestPackedModel", model=(loader, 0), kind=kind)
    save(graph, (quantised, 0), (loader, 1), (loader, 2), "quantised/x")
    error = fail(host, graph)
    assert "the model is quantised (" in error
    assert "load the model unquantised" in error
    assert not list((host.base / "output").glob("quantised/*"))
