"""What people get wrong, in a real ComfyUI: one message each, and the next run works."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tsdsr_core.bundle import write_bundle
from tsdsr_core.diffusers_models import load_builtin, merged_bundle
from tsdsr_core.fold import fold

from .host import Graph
from .host_graphs import BUILTIN, CPU, TILES, builtin_graph, load_sd3


def loras(message, **changes):
    """The LoRA loader with other files."""

    def make(host, sd3, graph):
        lora, _ = load_sd3(graph, **changes)
        graph.add("PreviewAny", source=(lora, 0))
        return message

    make.__name__ = "_".join(changes)
    return make


def lora_of_another_base(host, sd3, graph):
    tensors = {f"transformer.transformer_blocks.{i}.attn.to_q.lora_{x}.weight": torch.ones(*shape)
               for i in range(40) for x, shape in (("A", (2, 64)), ("B", (64, 2)))}  # fmt: skip
    save_file(tensors, host.base / "models" / "loras" / "other.safetensors")
    lora, _ = load_sd3(graph, transformer_lora="other.safetensors")
    graph.add("PreviewAny", source=(lora, 0))
    return "40 of 40 modules are left over"


def wrong_model(host, sd3, graph):
    builtin_graph(graph=graph, model=(graph.add("TestOtherModel"), 0))
    return "the MODEL is a BaseModel: TSD-SR runs on Stable Diffusion 3 medium"


def wrong_model_for_the_lora(host, sd3, graph):
    lora, _ = load_sd3(graph)
    graph.nodes[lora]["inputs"]["model"] = [graph.add("TestOtherModel"), 0]
    graph.add("PreviewAny", source=(lora, 0))
    return "the MODEL is a BaseModel: TSD-SR runs on Stable Diffusion 3 medium"


def wrong_vae(host, sd3, graph):
    lora, _ = load_sd3(graph)
    graph.nodes[lora]["inputs"]["vae"] = [graph.add("TestOtherModel"), 1]
    graph.add("PreviewAny", source=(lora, 1))
    return "the VAE is a TAESD: expected the one of Stable Diffusion 3"


def foreign_checkpoint(host, sd3, graph):
    save_file({"img_in.weight": torch.zeros(8, 8)}, host.base / "models" / "tsdsr" / "foreign.safetensors")
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint="foreign.safetensors", vae_precision="auto")
    graph.add("PreviewAny", source=(loader, 0))
    return "not a TSD-SR bundle"


def truncated_checkpoint(host, sd3, graph):
    save_file({"img_in.weight": torch.zeros(64, 64)}, path := host.base / "models" / "tsdsr" / "truncated.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint="truncated.safetensors", vae_precision="auto")
    graph.add("PreviewAny", source=(loader, 0))
    return "truncated.safetensors is damaged, truncated or not a safetensors file"


def other_channels(host, sd3, graph):
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    latent = graph.add("TestOddLatent", channels=4)
    step = graph.add("TSDSROneStep", model=(loader, 0), conditioning=(loader, 2), latent=(latent, 0), strength=1.0, **TILES)
    graph.add("PreviewAny", source=(step, 0))
    return "expected (batch, 16, height, width)"


def odd_image(kind, message):
    def make(host, sd3, graph):
        builtin_graph((graph.add("TestOddImage", kind=kind), 0), graph)
        return message

    make.__name__ = kind
    return make


def odd_prompt(kind, message):
    def make(host, sd3, graph):
        graph, _ = builtin_graph(graph=graph, conditioning=(graph.add("TestPrompt", kind=kind), 0))
        return message

    make.__name__ = kind
    return make


def prompt_of_another_model(host, sd3, graph):
    _, prompt = load_sd3(graph)
    builtin_graph(graph=graph, conditioning=(prompt, 0))
    return "the conditioning is 4096 and 2048 wide, this MODEL takes"


def prompt_that_begins_later(host, sd3, graph):
    graph, _ = builtin_graph(graph=graph)
    upscale = next(node["inputs"] for node in graph.nodes.values() if node["class_type"] == "TSDSRUpscale")
    later = graph.add("ConditioningSetTimestepRange", conditioning=tuple(upscale["conditioning"]), start=0.2, end=1.0)
    upscale["conditioning"] = [later, 0]
    return "remove its timestep range"


def latent_of_another_vae(host, sd3, graph):
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    decoded = graph.add("TSDSRDecode", latent=(graph.add("TestOddLatent", channels=4), 0), vae=(loader, 1))
    graph.add("PreviewImage", images=(decoded, 0))
    return "this VAE takes (batch, 16, height, width)"


def a_result_too_large(host, sd3, graph):
    image = graph.add("EmptyImage", width=1280, height=1024, batch_size=1, color=0)
    builtin_graph((image, 0), graph, **{"size.factor": 16.0})
    return "the result would be 20480x16384 pixels"


def a_latent_beyond_the_memory(host, sd3, graph):
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    latent = graph.add("EmptySD3LatentImage", width=16384, height=16384, batch_size=1)
    decoded = graph.add("TSDSRDecode", latent=(latent, 0), vae=(loader, 1))
    graph.add("PreviewImage", images=(decoded, 0))
    return "GB are free: choose a smaller size"


def sampled(graph, **inputs):
    """The sampler's way, with other inputs."""
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    given = {"model": (loader, 0), "conditioning": (loader, 2), "channels": 16, **inputs}
    sigmas = graph.add("BasicScheduler", model=(loader, 0), scheduler="simple", steps=1, denoise=1.0)
    guider = graph.add("BasicGuider", model=given["model"], conditioning=given["conditioning"])
    result = graph.add(
        "SamplerCustomAdvanced", noise=(graph.add("DisableNoise"), 0), guider=(guider, 0), sigmas=(sigmas, 0),
        sampler=(graph.add("TSDSRSampler", strength=1.0, **TILES), 0),
        latent_image=(graph.add("TestOddLatent", channels=given["channels"]), 0),
    )  # fmt: skip
    graph.add("PreviewAny", source=(result, 0))


def prompt_with_an_area_for_the_sampler(host, sd3, graph):
    sampled(graph, conditioning=(graph.add("TestPrompt", kind="area"), 0))
    return "'area'"


def checkpoint_with_more_blocks_than_heads(host, sd3, graph):
    model = load_builtin(CPU, torch.float32)
    transformer = type(model.transformer)(**{**model.transformer.config, "num_layers": 3})
    path = host.base / "models" / "tsdsr" / "deep.safetensors"
    write_bundle(path, merged_bundle(transformer, model.vae, model.prompt, torch.float32, model.defaults, {}))
    graph.add("PreviewAny", source=(graph.add("TSDSRLoadCheckpoint", checkpoint=path.name, vae_precision="auto"), 0))
    return "a transformer of 3 blocks with 2 heads: ComfyUI takes SD3 to have as many blocks as heads"


def fold_builtin(host, graph):
    """The built-in model, folded, as a bundle; its loader."""
    model = load_builtin(CPU, torch.float32)
    fold(model.transformer, model.prompt.pooled)
    path = host.base / "models" / "tsdsr" / "folded.safetensors"
    write_bundle(path, merged_bundle(model.transformer, model.vae, model.prompt, torch.float32, model.defaults, {}))
    return graph.add("TSDSRLoadCheckpoint", checkpoint=path.name, vae_precision="auto")


def another_prompt_for_a_folded_model(host, sd3, graph):
    builtin_graph(graph=graph, model=(fold_builtin(host, graph), 0), conditioning=(graph.add("TestPrompt", kind="zeros"), 0))
    return "this checkpoint is folded: it takes the one prompt it was made with"


def a_folded_model_saved_again(host, sd3, graph):
    loader = fold_builtin(host, graph)
    graph.add(
        "TSDSRSaveCheckpoint", model=(loader, 0), vae=(loader, 1), conditioning=(loader, 2), filename_prefix="x", dtype="fp16"
    )
    return "this checkpoint is folded already"


def several_steps(host, sd3, graph):
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    latent = graph.add("TestOddLatent", channels=16)
    sigmas = graph.add("BasicScheduler", model=(loader, 0), scheduler="simple", steps=20, denoise=1.0)
    guider = graph.add("BasicGuider", model=(loader, 0), conditioning=(loader, 2))
    sampled = graph.add(
        "SamplerCustomAdvanced", noise=(graph.add("DisableNoise"), 0), guider=(guider, 0), sigmas=(sigmas, 0),
        sampler=(graph.add("TSDSRSampler", strength=1.0, **TILES), 0), latent_image=(latent, 0),
    )  # fmt: skip
    graph.add("PreviewAny", source=(sampled, 0))
    return "set the scheduler to 1 step"


def a_path_upwards(host, sd3, graph):
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    graph.add(
        "TSDSRSaveCheckpoint", model=(loader, 0), vae=(loader, 1), conditioning=(loader, 2), filename_prefix="../../x",
        dtype="fp16",
    )  # fmt: skip
    return "leads out of the output folder"


def overlap_above_tile(host, sd3, graph):
    builtin_graph(graph=graph, tile=16, tile_overlap=32)
    return "tile_overlap 32 is not below tile 16"


def tile_too_small(host, sd3, graph):
    builtin_graph(graph=graph, tile=8, tile_overlap=2)
    return "tile 8: expected 0 for automatic, or at least 16"


def vae_tile_too_small(host, sd3, graph):
    builtin_graph(graph=graph, vae_tile=8)
    return "VAE tile 8: expected at least 16"


def far_too_large(host, sd3, graph):
    graph, _ = builtin_graph(graph=graph, **{"size": "width", "size.pixels": 2000})
    for node in graph.nodes.values():
        node["inputs"].pop("size.factor", None)
    return "width 2000 is 38.5 times the input"


CASES = [
    loras("are the two files swapped?", transformer_lora="tsdsr/vae.safetensors"),
    loras("are the two files swapped?", vae_lora="tsdsr/transformer.safetensors"),
    lora_of_another_base, wrong_model, wrong_model_for_the_lora, wrong_vae, foreign_checkpoint, truncated_checkpoint,
    checkpoint_with_more_blocks_than_heads,
    other_channels, several_steps, a_path_upwards, overlap_above_tile, tile_too_small,
    vae_tile_too_small, far_too_large,
    odd_image("nan", "NaN or infinite pixels"), odd_image("empty batch", "not empty"), odd_image("text", "expected (batch"),
    odd_prompt("no pooled output", "no pooled output, which SD3 needs"), odd_prompt("area", "'area'"),
    odd_prompt("nothing", "the conditioning is empty"), prompt_of_another_model, prompt_that_begins_later,
    another_prompt_for_a_folded_model, a_folded_model_saved_again,
    latent_of_another_vae, a_result_too_large, a_latent_beyond_the_memory, prompt_with_an_area_for_the_sampler,
]  # fmt: skip


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_bad_input_is_one_message_and_the_next_run_works(make, host, sd3):
    graph = Graph()
    message = make(host, sd3, graph)
    result = host.run(graph)
    assert result.status == "error"
    assert message in result.error
    assert len(result.error.strip().splitlines()) == 1
    graph, _ = builtin_graph(strength=0.9)
    assert host.run(graph).status == "success"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "gone.safetensors"])
def test_a_file_that_is_not_listed_is_refused_before_the_run(name, host, sd3):
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=name, vae_precision="auto")
    graph.add("PreviewAny", source=(loader, 0))
    answer = host.post("/prompt", {"prompt": graph.nodes})
    errors = [error for node in answer["node_errors"].values() for error in node["errors"]]
    assert [error["type"] for error in errors] == ["value_not_in_list"]
    assert name in json.dumps(errors)
