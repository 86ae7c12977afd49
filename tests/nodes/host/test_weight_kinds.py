"""Weight files in a real ComfyUI: the strength that PEFT's configuration gives, and files of other kinds and number types."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ...comfyui.graphs import load_sd3, stages
from ...comfyui.host import Graph
from ...weights.test_number_types import retyped


def restored(host, **changes) -> np.ndarray:
    graph = Graph()
    lora, prompt = load_sd3(graph, **changes)
    save = stages(graph, (lora, 0), (lora, 1), (prompt, 0), "strength")
    result = host.run(graph)
    assert result.status == "success", result.error
    return result.pictures(save)[0].astype(int)


def test_the_configuration_beside_a_lora_gives_its_strength(host, sd3):
    folder = sd3.loras.with_name("peft")
    shutil.copytree(sd3.loras, folder, dirs_exist_ok=True)
    config, lora = folder / "adapter_config.json", "peft/transformer.safetensors"
    plain, double = restored(host), restored(host, transformer_strength=2.0)
    assert np.abs(plain - double).max() > 4
    assert np.array_equal(restored(host, transformer_lora=lora), plain)
    settings = {"peft_type": "LORA", "r": 4, "target_modules": r"(transformer_blocks|norm_out|proj_out|context|pos).*"}
    config.write_text(json.dumps(settings | {"lora_alpha": 8}))
    both = {"transformer_lora": lora, "vae_lora": "peft/vae.safetensors"}
    assert np.array_equal(restored(host, **both), double)
    config.write_text(json.dumps(settings | {"lora_alpha": 4}))
    assert np.array_equal(restored(host, **both), plain)
    config.write_text(json.dumps(settings | {"lora_alpha": 4, "r": 3}))
    graph = Graph()
    loader, _ = load_sd3(graph, **both)
    graph.add("PreviewAny", source=(loader, 0))
    assert "adapter_config.json beside it is of another LoRA (rank 3 for" in refused(host, graph)


def refused(host, graph) -> str:
    result = host.run(graph)
    assert result.status == "error"
    assert len(result.error.strip().splitlines()) == 1, result.error
    return result.error


def loading(name: str, file: str) -> Graph:
    graph = Graph()
    if name == "lora":
        loader, _ = load_sd3(graph, transformer_lora=file)
    elif name == "prompt":
        loader = graph.add("TSDSRLoadPrompt", prompt=file)
    else:
        loader = graph.add("TSDSRLoadCheckpoint", checkpoint=file, vae_precision="auto")
    graph.add("PreviewAny", source=(loader, 0))
    return graph


NODES = ["lora", "prompt", "checkpoint"]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "F8_E8M0", "F8_E3M4"])
def test_a_type_that_no_weights_have_is_named(kind, node, host, sd3):
    path = host.base / "models" / "tsdsr" / f"{node} {kind}.safetensors"
    source = host.base / "source.safetensors"
    tensors = {"prompt_embeds": torch.ones(1, 8, 64), "pooled_prompt_embeds": torch.ones(1, 64)}
    key = {"lora": "transformer.proj_out.lora_A.weight", "prompt": "prompt_embeds", "checkpoint": "transformer.x"}[node]
    if node == "lora":
        tensors = {"transformer.proj_out.lora_B.weight": torch.ones(64, 4), key: torch.ones(4, 128)}
    if node == "checkpoint":
        tensors |= {key: torch.ones(4, 4), "vae.x": torch.ones(4, 4)}
    config = {"version": 1, "kind": "lora", "defaults": {}, "notes": {}}
    save_file(tensors, source, {"tsdsr_bundle": json.dumps(config)} if node == "checkpoint" else None)
    retyped(source, path, kind, key)
    graph = loading("lora" if node == "checkpoint" else node, path.name)
    assert f"holds {kind} numbers in {key.removeprefix('transformer.') if node == 'checkpoint' else key}" in refused(
        host, graph
    ).replace("transformer.x", "x")


@pytest.mark.parametrize("node", NODES)
def test_a_checkpoint_of_the_base_model_is_named(node, host, sd3):
    for folder in ("tsdsr", "loras"):
        shutil.copy(host.base / "models" / "checkpoints" / "sd3_medium.safetensors", host.base / "models" / folder)
    said = refused(host, loading(node, "sd3_medium.safetensors"))
    assert "a Stable Diffusion 3 medium model, with VAE, without text encoders" in said
    if node == "checkpoint":
        assert "in ComfyUI, open it with Load Checkpoint and connect TSD-SR Load LoRA" in said
