"""What people get wrong, in a real ComfyUI: one message each, and the next run works."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tsdsr_core.families.bundle import BUILTIN as BUILTIN_FILE
from tsdsr_core.families.bundle import Bundle, read_bundle, write_bundle
from tsdsr_core.families.load import load, merged_bundle
from tsdsr_core.families.sd3.fold import fold

from ...comfyui.graphs import BUILTIN, CPU, TILES, builtin_graph, load_sd3
from ...comfyui.host import Graph


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
    return "40 of 40 modules do not match"


def wrong_model(host, sd3, graph):
    builtin_graph(graph=graph, model=(graph.add("TestOtherModel"), 0))
    return "the MODEL is not Stable Diffusion 3 (BaseModel): connect"


def wrong_model_for_the_lora(host, sd3, graph):
    lora, _ = load_sd3(graph)
    graph.nodes[lora]["inputs"]["model"] = [graph.add("TestOtherModel"), 0]
    graph.add("PreviewAny", source=(lora, 0))
    return "the MODEL is not Stable Diffusion 3 (BaseModel): connect"


def wrong_vae(host, sd3, graph):
    lora, _ = load_sd3(graph)
    graph.nodes[lora]["inputs"]["vae"] = [graph.add("TestOtherModel"), 1]
    graph.add("PreviewAny", source=(lora, 1))
    return "the VAE is of another kind (TAESD): connect the VAE of Stable Diffusion 3"


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


def lora_bundle(host, sd3, graph):
    factors = [
        {f"{name}.lora_A.weight": torch.ones(1, 1), f"{name}.lora_B.weight": torch.ones(1, 1)} for name in ("a", "encoder.a")
    ]
    write_bundle(
        host.base / "models" / "tsdsr" / "loras.safetensors", Bundle("lora", read_bundle(BUILTIN_FILE).prompt, *factors)
    )
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint="loras.safetensors", vae_precision="auto")
    graph.add("PreviewAny", source=(loader, 0))
    return "loras.safetensors: this bundle holds only LoRAs: load Stable Diffusion 3 as the model and the bundle as the LoRA"


def other_channels(host, sd3, graph):
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    latent = graph.add("TestOddLatent", channels=4)
    step = graph.add("TSDSROneStep", model=(loader, 0), conditioning=(loader, 2), latent=(latent, 0), strength=1.0, **TILES)
    graph.add("PreviewAny", source=(step, 0))
    return "expected floats of (batch, 16, height, width)"


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
    return "the conditioning has widths 4096 and 2048, but the MODEL expects 64 and 64"


def prompt_that_begins_later(host, sd3, graph):
    graph, _ = builtin_graph(graph=graph)
    upscale = next(node["inputs"] for node in graph.nodes.values() if node["class_type"] == "TSDSRUpscale")
    later = graph.add("ConditioningSetTimestepRange", conditioning=tuple(upscale["conditioning"]), start=0.2, end=1.0)
    upscale["conditioning"] = [later, 0]
    return "remove the range"


def latent_of_another_vae(host, sd3, graph):
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    decoded = graph.add("TSDSRDecode", latent=(graph.add("TestOddLatent", channels=4), 0), vae=(loader, 1))
    graph.add("PreviewImage", images=(decoded, 0))
    return "expected floats of (batch, 16, height, width); connect the VAE"


def a_result_too_large(host, sd3, graph):
    image = graph.add("EmptyImage", width=1280, height=1024, batch_size=1, color=0)
    builtin_graph((image, 0), graph, **{"size.factor": 16.0})
    return "the result would be 20480x16384 pixels"


def a_latent_beyond_the_memory(host, sd3, graph):
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    small = graph.add("EmptySD3LatentImage", width=16384, height=16384, batch_size=1)
    latent = graph.add("LatentUpscaleBy", samples=(small, 0), upscale_method="nearest-exact", scale_by=2.0)
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
    return "'area', which is not supported with tiled inference"


def checkpoint_with_more_blocks_than_heads(host, sd3, graph):
    model = load("builtin", device=CPU, dtype=torch.float32)
    transformer = type(model.transformer)(**{**model.transformer.config, "num_layers": 3})
    path = host.base / "models" / "tsdsr" / "deep.safetensors"
    write_bundle(path, merged_bundle(transformer, model.vae, model.prompt, torch.float32, model.defaults, {}))
    graph.add("PreviewAny", source=(graph.add("TSDSRLoadCheckpoint", checkpoint=path.name, vae_precision="auto"), 0))
    return "the transformer has 3 blocks and 2 heads: ComfyUI supports SD3 only with as many blocks as heads"


def fold_builtin(host, graph):
    """The built-in model, folded, as a bundle; its loader."""
    model = load("builtin", device=CPU, dtype=torch.float32)
    fold(model.transformer, model.prompt.pooled)
    path = host.base / "models" / "tsdsr" / "folded.safetensors"
    write_bundle(path, merged_bundle(model.transformer, model.vae, model.prompt, torch.float32, model.defaults, {}))
    return graph.add("TSDSRLoadCheckpoint", checkpoint=path.name, vae_precision="auto")


def another_prompt_for_a_folded_model(host, sd3, graph):
    builtin_graph(graph=graph, model=(fold_builtin(host, graph), 0), conditioning=(graph.add("TestPrompt", kind="zeros"), 0))
    return "this checkpoint is folded and works only with the prompt it was made with"


def a_folded_model_saved_again(host, sd3, graph):
    loader = fold_builtin(host, graph)
    graph.add(
        "TSDSRSaveCheckpoint", model=(loader, 0), vae=(loader, 1), conditioning=(loader, 2), filename_prefix="x", dtype="fp16"
    )
    return "this checkpoint is folded, which cannot be saved again"


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
    return "set BasicScheduler to 1 step"


def a_path_upwards(host, sd3, graph):
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    graph.add(
        "TSDSRSaveCheckpoint", model=(loader, 0), vae=(loader, 1), conditioning=(loader, 2), filename_prefix="../../x",
        dtype="fp16",
    )  # fmt: skip
    return "points outside the output folder"


def overlap_above_tile(host, sd3, graph):
    builtin_graph(graph=graph, tile=16, tile_overlap=32)
    return "tile_overlap 32: expected at most 12, three quarters of tile 16"


def overlap_near_the_automatic_tile(host, sd3, graph):
    builtin_graph(graph=graph, tile=0, tile_overlap=62)
    return "tile_overlap 62: expected at most 48, three quarters of the automatic tile size 64"


def odd_tile(host, sd3, graph):
    builtin_graph(graph=graph, tile=33)
    return "tile 33: expected an even number"


def odd_overlap(host, sd3, graph):
    builtin_graph(graph=graph, tile=32, tile_overlap=5)
    return "tile_overlap 5: expected an even number"


FIXES = "expected one of wavelet, adain, lab, none"
SIZES = "expected one of scale by, longer side, shorter side, width, height"


def without(choice, expected):
    """The request of a script that leaves a dynamic choice out."""

    def make(host, sd3, graph):
        builtin_graph(graph=graph)
        upscale = next(node["inputs"] for node in graph.nodes.values() if node["class_type"] == "TSDSRUpscale")
        del upscale[choice]
        return f"{choice} is missing or misspelt: {expected}"

    make.__name__ = f"without_{choice}"
    return make


def misspelt(choice, value, expected):
    """The request of a script that misspells a dynamic choice."""

    def make(host, sd3, graph):
        builtin_graph(graph=graph, **{choice: value})
        return about_misspelt(host, choice, value, expected)

    make.__name__ = f"misspelt_{choice}"
    return make


def about_misspelt(host, choice, value, expected):
    """What is said of it: older hosts do not pass on what they do not know."""
    return f"{choice} {value!r}: {expected}" if host.passes_all_inputs else f"{choice} is missing or misspelt: {expected}"


def misspelt_colour_fix_of_the_node_on_its_own(host, sd3, graph):
    image = graph.add("LoadImage", image="photo.png")
    fixed = graph.add("TSDSRColorFix", image=(image, 0), reference=(image, 0), color_fix="Wavelet")
    graph.add("PreviewImage", images=(fixed, 0))
    return about_misspelt(host, "color_fix", "Wavelet", FIXES)


def linked(name, kind, value, message):
    """A value that the host does not check, since it comes over a connection."""

    def make(host, sd3, graph):
        builtin_graph(graph=graph, **{name: (graph.add("TestValue", kind=kind, name=value), 0)})
        return message

    make.__name__ = f"{name}_{value}"
    return make


def tile_too_small(host, sd3, graph):
    builtin_graph(graph=graph, tile=8, tile_overlap=2)
    return "tile 8: expected 0 (automatic) or at least 16"


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
    lora_bundle, checkpoint_with_more_blocks_than_heads,
    other_channels, several_steps, a_path_upwards, overlap_above_tile, tile_too_small,
    vae_tile_too_small, far_too_large, overlap_near_the_automatic_tile, odd_tile, odd_overlap,
    without("size", SIZES), without("color_fix", FIXES),
    misspelt("size", "scale_by", SIZES), misspelt("size", None, SIZES), misspelt("color_fix", "Adain", FIXES),
    misspelt_colour_fix_of_the_node_on_its_own,
    linked("strength", "FLOAT", "nan", "strength nan: expected a number from 0 to 2"),
    linked("size.factor", "FLOAT", "nan", "size.factor nan: expected a number from 1 to 16"),
    linked("color_fix.wavelet_levels", "INT", "huge", "wavelet_levels 1000000000: expected a whole number from 0 to 10"),
    linked("tile_batch", "INT", "-1", "tile_batch -1: expected a whole number from 0 to 64"),
    linked("vae", "VAE", "None", "vae None: expected a VAE"),
    linked("image", "IMAGE", "0 to 255", "so the result would be white: expected an IMAGE"),
    linked("image", "IMAGE", "bytes", "image of torch.uint8: expected an IMAGE"),
    odd_image("nan", "NaN or infinite values"), odd_image("empty batch", "not empty"), odd_image("text", "expected an IMAGE"),
    odd_prompt("no pooled output", "no pooled output, which SD3 needs"),
    odd_prompt("area", "'area', which is not supported with tiled inference"),
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


def test_every_bad_value_of_every_input_is_one_sentence_before_any_work(host, sd3):
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    sweep = graph.add("TestBadValues", model=(loader, 0), vae=(loader, 1), conditioning=(loader, 2))
    result = host.run(graph)
    assert result.status == "success", result.error
    found = json.loads(result.outputs[sweep]["text"][0])
    assert len({node for node, *_ in found}) == 10
    assert len(found) > 300
    for node, name, bad, kind, message in found:
        case = f"{node} {name} {bad}: {kind} {message}"
        assert kind in ("ValueError", "InputError"), case
        assert message.startswith(name), case
        assert "expected" in message, case
        assert len(message.splitlines()) == 1, case
        assert len(message) < 250, case
