"""The nodes in a real ComfyUI, against the core on diffusers."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

from tsdsr_core.bundle import read_bundle, write_bundle
from tsdsr_core.diffusers_models import load_builtin, load_bundle, load_folder, merged_bundle
from tsdsr_core.image_io import read_picture
from tsdsr_core.lora import load_lora
from tsdsr_core.prompt import load_prompt
from tsdsr_core.restore import Options, restore
from tsdsr_core.sd3 import VAE_CONFIG

from . import host as host_module
from .host import Graph
from .tiny import TRANSFORMER_TARGETS, VAE_TARGETS, randomised_lora

FOUND = host_module.find()
pytestmark = pytest.mark.skipif(FOUND is None, reason="no ComfyUI: set COMFYUI_PATH, and COMFYUI_PYTHON where it has no .venv")
CPU = torch.device("cpu")
BUILTIN = "built-in model (no download)"
NODES = [
    "LoadLora",
    "LoadPrompt",
    "LoadCheckpoint",
    "SaveCheckpoint",
    "Sampler",
    "OneStep",
    "Encode",
    "Decode",
    "ColorFix",
    "Upscale",
]
TRANSFORMER = {
    "sample_size": 64, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2, "attention_head_dim": 64,
    "num_attention_heads": 2, "caption_projection_dim": 128, "joint_attention_dim": 64, "pooled_projection_dim": 48,
    "pos_embed_max_size": 96,
}  # fmt: skip
TILES = {"tile": 16, "tile_overlap": 4, "tile_batch": 0}
UPSCALE = {
    "strength": 1.0,
    "color_fix": "wavelet",
    "color_fix.wavelet_levels": 0,
    "tile": 64,
    "tile_overlap": 8,
    "tile_batch": 0,
}


@dataclass
class SD3:
    """Random weights in SD3's layout: a tiny transformer, the VAE at full size, as ComfyUI's own loaders want it."""

    folder: Path
    loras: Path
    embeddings: Path


@pytest.fixture(scope="module")
def sd3(host) -> SD3:
    models = host.base / "models"
    torch.manual_seed(0)
    transformer, vae = SD3Transformer2DModel(**TRANSFORMER), AutoencoderKL(**VAE_CONFIG)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.3)
    found = SD3(host.base / "sd3", models / "loras" / "tsdsr", models / "tsdsr" / "default")
    transformer.save_pretrained(found.folder / "transformer")
    vae.save_pretrained(found.folder / "vae")
    save_file(transformer.state_dict(), models / "diffusion_models" / "sd3.safetensors")
    save_file(vae.state_dict(), models / "vae" / "sd3.safetensors")
    found.loras.mkdir(parents=True)
    found.embeddings.mkdir(parents=True)
    for model, targets, name in ((transformer, TRANSFORMER_TARGETS, "transformer"), (vae, VAE_TARGETS, "vae")):
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
        tensors = {key: 0.3 * tensor for key, tensor in randomised_lora(model).items()}
        save_file(tensors, found.loras / f"{name}.safetensors")
    torch.save(torch.randn(1, 9, 64), found.embeddings / "prompt_embeds.pt")
    torch.save(torch.randn(1, 48), found.embeddings / "pool_embeds.pt")
    return found


def core_sd3(sd3: SD3):
    loras = load_lora(sd3.loras / "transformer.safetensors"), load_lora(sd3.loras / "vae.safetensors")
    return load_folder(sd3.folder, loras, load_prompt(sd3.embeddings), CPU, torch.float32)


def load_sd3(graph: Graph, **changes) -> tuple[str, str]:
    """(LoRA loader, prompt loader)."""
    model = graph.add("UNETLoader", unet_name="sd3.safetensors", weight_dtype="default")
    vae = graph.add("VAELoader", vae_name="sd3.safetensors")
    inputs = {
        "transformer_lora": "tsdsr/transformer.safetensors", "vae_lora": "tsdsr/vae.safetensors", "transformer_strength": 1.0,
        "vae_strength": 1.0, "vae_precision": "fp32", **changes,
    }  # fmt: skip
    lora = graph.add("TSDSRLoadLora", model=(model, 0), vae=(vae, 0), **inputs)
    return lora, graph.add("TSDSRLoadPrompt", prompt="default/prompt_embeds.pt")


def builtin_graph(image: tuple[str, int] | str = "photo.png", graph: Graph | None = None, **changes) -> tuple[Graph, str]:
    """The all-in-one graph of the built-in model, and its SaveImage node."""
    graph = graph or Graph()
    source = (graph.add("LoadImage", image=image), 0) if isinstance(image, str) else image
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN)
    inputs = {"model": (loader, 0), "vae": (loader, 1), "conditioning": (loader, 2), "size": "scale by", "size.factor": 2.0}
    result = graph.add("TSDSRUpscale", image=source, **{**inputs, **UPSCALE, **changes})
    return graph, graph.add("SaveImage", images=(result, 0), filename_prefix="test")


def differs(found: np.ndarray, expected: torch.Tensor) -> float:
    """Largest difference in 8-bit levels; the host's SaveImage cuts fractions off."""
    assert found.shape == tuple(expected.permute(1, 2, 0).shape)
    return np.abs(found - np.floor(expected.permute(1, 2, 0).numpy() * 255)).max()


def test_the_pack_is_imported_without_a_word_and_fast(host):
    log = host.log.read_text()
    assert "IMPORT FAILED" not in log
    seconds = float(re.search(rf"([\d.]+) seconds: .*{host_module.PACK}", log)[1])
    assert seconds < 0.5
    assert not [
        line for line in log.splitlines() if "tsd" in line.lower() and ("warn" in line.lower() or "error" in line.lower())
    ]


def test_every_node_is_described(host):
    info = host.get("/object_info")
    for name in NODES:
        node = info[f"TSDSR{name}"]
        assert node["category"] == "image/upscaling/TSD-SR"
        assert node["description"]
        assert node["display_name"].startswith("TSD-SR ")
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        plain = {"image", "vae", "latent", "model", "conditioning"}
        assert all(options[1].get("tooltip") for key, options in inputs.items() if key not in plain), name


def test_saved_workflows_stay_valid(host):
    """Ids, inputs and outputs in their order, as people's workflows refer to them: only ever add to this file."""
    info = host.get("/object_info")
    found = {name: {"inputs": node["input_order"], "outputs": node["output"]}
             for name, node in info.items() if name.startswith("TSDSR")}  # fmt: skip
    assert found == json.loads((host_module.ROOT / "tests" / "data" / "nodes.json").read_text())


def test_help_workflows_and_languages_are_served(host):
    info = host.get("/object_info")
    names = [name for name in info if name.startswith("TSDSR")]
    assert len(names) == len(NODES)
    for name in names:
        with urllib.request.urlopen(f"http://127.0.0.1:{host.port}/extensions/{host_module.PACK}/docs/{name}.md") as page:
            assert page.read().decode().startswith(f"# {info[name]['display_name']}")
    blueprints = {entry["name"] for entry in host.get("/global_subgraphs").values()}
    assert {path.stem for path in (host_module.ROOT / "subgraphs").glob("*.json")} <= blueprints
    templates = host.get("/workflow_templates")[host_module.PACK]
    for template in templates:
        assert host.get(f"/api/workflow_templates/{host_module.PACK}/{urllib.parse.quote(template)}.json")["nodes"]
    languages = host.get("/i18n")
    for language in ("en", "zh", "ja", "ko"):
        for name in names:
            said = languages[language]["nodeDefs"][name]
            described = {"display_name": info[name]["display_name"], "description": info[name]["description"]}
            inputs = {**info[name]["input"].get("required", {}), **info[name]["input"].get("optional", {})}
            assert said["inputs"].keys() == inputs.keys()
            for key, (_, options) in inputs.items():
                assert ("tooltip" in said["inputs"][key]) == ("tooltip" in options), (language, name, key)
                assert language != "en" or said["inputs"][key].get("tooltip") == options.get("tooltip"), (name, key)
            assert language != "en" or {key: said[key] for key in described} == described


def test_the_built_in_model_gives_what_the_core_gives(host):
    graph, save = builtin_graph()
    result = host.run(graph)
    assert result.status == "success", result.error
    model = load_builtin(CPU, torch.float32)
    low = read_picture(host.base / "input" / "photo.png").rgb
    expected = restore(low, model.restorer(), Options(scale=2.0, **model.defaults))
    assert differs(result.pictures(save)[0], expected[0]) <= 1


@pytest.fixture(scope="module")
def modular(host, sd3):
    """Encode, one step, decode and colour fix apart; the sampler's way; and a saved checkpoint, in one run."""
    graph = Graph()
    image = graph.add("LoadImage", image="photo.png")
    lora, prompt = load_sd3(graph)
    latent = graph.add("TSDSREncode", image=(image, 0), vae=(lora, 1))
    step = graph.add("TSDSROneStep", model=(lora, 0), conditioning=(prompt, 0), latent=(latent, 0), strength=1.0, **TILES)
    sampler = graph.add("TSDSRSampler", strength=1.0, **TILES)
    guider = graph.add("BasicGuider", model=(lora, 0), conditioning=(prompt, 0))
    sigmas = graph.add("BasicScheduler", model=(lora, 0), scheduler="simple", steps=1, denoise=1.0)
    stock = graph.add(
        "SamplerCustomAdvanced", noise=(graph.add("DisableNoise"), 0), guider=(guider, 0), sampler=(sampler, 0),
        sigmas=(sigmas, 0), latent_image=(latent, 0),
    )  # fmt: skip
    saves = {}
    for name, samples in (("node", step), ("sampler", stock)):
        picture = graph.add("TSDSRDecode", latent=(samples, 0), vae=(lora, 1))
        fixed = graph.add(
            "TSDSRColorFix", image=(picture, 0), reference=(image, 0), color_fix="wavelet", **{"color_fix.wavelet_levels": 5}
        )
        saves[name] = graph.add("SaveImage", images=(fixed, 0), filename_prefix=name)
    bundle = graph.add(
        "TSDSRSaveCheckpoint", model=(lora, 0), vae=(lora, 1), conditioning=(prompt, 0), filename_prefix="checkpoints/x",
        dtype="fp32",
    )  # fmt: skip
    result = host.run(graph)
    assert result.status == "success", result.error
    return result, saves, host.base / "output" / result.outputs[bundle]["text"][0]


@pytest.fixture(scope="module")
def expected(host, sd3) -> torch.Tensor:
    low = read_picture(host.base / "input" / "photo.png").rgb
    options = Options(scale=1.0, process_size=0, tile=16, tile_overlap=4)
    return restore(low, core_sd3(sd3).restorer(), options)[0]


@pytest.mark.parametrize("way", ["node", "sampler"])
def test_sd3_with_loras_gives_what_the_core_gives(way, modular, expected):
    result, saves, _ = modular
    assert differs(result.pictures(saves[way])[0], expected) <= 1


def test_the_vae_changes_its_type_for_the_lora(host, sd3, expected):
    graph = Graph()
    image = graph.add("LoadImage", image="photo.png")
    lora, prompt = load_sd3(graph, vae_precision="fp16")
    latent = graph.add("TSDSREncode", image=(image, 0), vae=(lora, 1))
    step = graph.add("TSDSROneStep", model=(lora, 0), conditioning=(prompt, 0), latent=(latent, 0), strength=1.0, **TILES)
    decoded = graph.add("TSDSRDecode", latent=(step, 0), vae=(lora, 1))
    fixed = graph.add(
        "TSDSRColorFix", image=(decoded, 0), reference=(image, 0), color_fix="wavelet", **{"color_fix.wavelet_levels": 5}
    )
    save = graph.add("SaveImage", images=(fixed, 0), filename_prefix="fp16")
    result = host.run(graph)
    assert result.status == "success", result.error
    found = result.pictures(save)[0].astype(float)
    exact = np.floor(expected.permute(1, 2, 0).numpy() * 255)
    assert 0 < np.abs(found - exact).mean() < 1.5, "rounded, but the same picture"


def test_a_saved_checkpoint_holds_the_merged_model(modular, expected, host):
    model = load_bundle(read_bundle(modular[2]), CPU, torch.float32)
    low = read_picture(host.base / "input" / "photo.png").rgb
    found = restore(low, model.restorer(), Options(scale=1.0, process_size=0, tile=16, tile_overlap=4))[0]
    assert (found - expected).abs().max() < 1e-4


def test_a_bundle_made_by_the_core_runs_natively(host, sd3, expected):
    model = core_sd3(sd3)
    path = host.base / "models" / "tsdsr" / "merged.safetensors"
    defaults = {"process_size": 0, "wavelet_levels": 5}
    write_bundle(path, merged_bundle(model.transformer, model.vae, model.prompt, torch.float32, defaults, {}))
    graph = Graph()
    image = graph.add("LoadImage", image="photo.png")
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint="merged.safetensors")
    inputs = {"model": (loader, 0), "vae": (loader, 1), "conditioning": (loader, 2), "size": "scale by", "size.factor": 1.0}
    result = graph.add("TSDSRUpscale", image=(image, 0), **{**inputs, **UPSCALE, **TILES})
    save = graph.add("SaveImage", images=(result, 0), filename_prefix="bundle")
    found = host.run(graph)
    assert found.status == "success", found.error
    assert differs(found.pictures(save)[0], expected) <= 1
    path.write_bytes(path.read_bytes()[:-1000])
    found = host.run(graph)
    assert "merged.safetensors" in found.error
    assert "damaged" in found.error


@pytest.fixture(scope="module")
def checkpoint(host, sd3) -> None:
    """The files that the example workflows name, with random weights."""
    folder, python = FOUND
    (host.base / "models" / "checkpoints").mkdir(exist_ok=True)
    parts = [host.base / "models" / kind / "sd3.safetensors" for kind in ("diffusion_models", "vae")]
    target = host.base / "models" / "checkpoints" / "sd3_medium.safetensors"
    script = host_module.ROOT / "tests" / "host_pack" / "make_checkpoint.py"
    subprocess.run([python, script, *parts, target], cwd=folder, check=True)
    shutil.copy(target, target.with_name("sd3_medium_incl_clips.safetensors"))
    for path in sd3.embeddings.iterdir():
        shutil.copy(path, host.base / "models" / "tsdsr")


@pytest.mark.parametrize("path", sorted((host_module.ROOT / "workflows" / "api").glob("*.json")), ids=lambda path: path.stem)
def test_every_example_workflow_runs(path, host, checkpoint):
    """As it stands, but for what real SD3 weights would be needed for: text encoders, and working at 512 pixels."""
    graph = Graph()
    graph.nodes = json.loads(path.read_text())
    text = [name for name, node in graph.nodes.items() if node["class_type"] == "CLIPTextEncode"]
    for name in text:
        graph.nodes[name] = {"class_type": "TSDSRLoadPrompt", "inputs": {"prompt": "prompt_embeds.pt"}}
    for node in graph.nodes.values():
        if node["class_type"] == "EmptySD3LatentImage":
            node["inputs"] |= {"width": 64, "height": 64}
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    result = host.run(graph, 900)
    assert result.status == "success", result.error
    save = next(name for name, node in graph.nodes.items() if node["class_type"] == "SaveImage")
    pictures = result.pictures(save)
    sizes = {"whole folder": {(64, 80), (84, 68)}, "text to image": {(128, 128)}}
    expected = next((size for key, size in sizes.items() if key in path.stem), {(64, 80)})
    assert {picture.shape[:2] for picture in pictures} == expected


def test_latents_of_odd_sides_keep_their_size(host):
    """The transformer works on patches of two cells; a preview is made of every batch of tiles all the same."""
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN)
    latent = graph.add("TestOddLatent", channels=16)
    step = graph.add("TSDSROneStep", model=(loader, 0), conditioning=(loader, 2), latent=(latent, 0), strength=1.0, **TILES)
    decoded = graph.add("TSDSRDecode", latent=(step, 0), vae=(loader, 1))
    save = graph.add("SaveImage", images=(decoded, 0), filename_prefix="odd")
    result = host.run(graph)
    assert result.status == "success", result.error
    assert result.pictures(save)[0].shape == (36, 28, 3)


def test_alpha_is_enlarged_and_kept(host):
    graph, save = builtin_graph()
    graph.nodes["1"] = {"class_type": "LoadImage", "inputs": {"image": "alpha.png"}}
    joined = graph.add("JoinImageWithAlpha", image=("1", 0), alpha=("1", 1))
    upscale = next(name for name, node in graph.nodes.items() if node["class_type"] == "TSDSRUpscale")
    graph.nodes[upscale]["inputs"]["image"] = [joined, 0]
    result = host.run(graph)
    assert result.status == "success", result.error
    picture = result.pictures(save)[0]
    assert picture.shape == (40, 52, 4)
    alpha = np.array(Image.open(host.base / "input" / "alpha.png").getchannel("A"))
    shrunk = np.array(Image.fromarray(picture[..., 3]).resize((26, 20), Image.Resampling.BOX))
    assert np.abs(shrunk.astype(int) - alpha).mean() < 5


def test_images_of_a_batch_do_not_touch_each_other(host):
    graph = Graph()
    images = [graph.add("LoadImage", image="photo.png")]
    images.append(graph.add("ImageInvert", image=(images[0], 0)))
    batch = graph.add("ImageBatch", image1=(images[0], 0), image2=(images[1], 0))
    graph, together = builtin_graph((batch, 0), graph)
    graph, alone = builtin_graph((images[1], 0), graph)
    result = host.run(graph)
    assert result.status == "success", result.error
    assert np.array_equal(result.pictures(together)[1], result.pictures(alone)[0])
    assert not np.array_equal(result.pictures(together)[0], result.pictures(alone)[0])


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"size": "scale by", "size.factor": 2.5}, (110, 130)),
        ({"size": "longer side", "size.pixels": 101}, (85, 101)),
        ({"size": "shorter side", "size.pixels": 33}, (33, 39)),
        ({"size": "width", "size.pixels": 60}, (51, 60)),
        ({"size": "height", "size.pixels": 90}, (90, 106)),
    ],
)
def test_sizes_are_met_to_the_pixel(size, expected, host):
    graph, save = builtin_graph(**size)
    for node in graph.nodes.values():
        if node["class_type"] == "TSDSRUpscale" and size["size"] != "scale by":
            del node["inputs"]["size.factor"]
    result = host.run(graph)
    assert result.status == "success", result.error
    assert result.pictures(save)[0].shape[:2] == expected


@pytest.mark.parametrize("kind", ["one pixel", "grey"])
def test_small_and_grey_images_are_restored(kind, host):
    graph = Graph()
    graph, save = builtin_graph((graph.add("TestOddImage", kind=kind), 0), graph)
    result = host.run(graph)
    assert result.status == "success", result.error
    assert result.pictures(save)[0].shape == {"one pixel": (2, 2, 3), "grey": (16, 16, 3)}[kind]


def wrong_lora(host, sd3, graph):
    lora, _ = load_sd3(graph, transformer_lora="tsdsr/vae.safetensors")
    graph.add("PreviewAny", source=(lora, 0))
    return "are the two files swapped?"


def lora_of_another_base(host, sd3, graph):
    tensors = {f"transformer.transformer_blocks.{i}.attn.to_q.lora_{x}.weight": torch.ones(*shape)
               for i in range(40) for x, shape in (("A", (2, 64)), ("B", (64, 2)))}  # fmt: skip
    save_file(tensors, host.base / "models" / "loras" / "other.safetensors")
    lora, _ = load_sd3(graph, transformer_lora="other.safetensors")
    graph.add("PreviewAny", source=(lora, 0))
    return "40 of 40 modules are left over"


def wrong_model(host, sd3, graph):
    graph, _ = builtin_graph(graph=graph)
    weights = {"img_in.weight": torch.zeros(8, 8)}
    save_file(weights, host.base / "models" / "tsdsr" / "foreign.safetensors")
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint="foreign.safetensors")
    graph.add("PreviewAny", source=(loader, 0))
    return "not a TSD-SR bundle"


def other_channels(host, sd3, graph):
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN)
    latent = graph.add("TestOddLatent", channels=4)
    step = graph.add("TSDSROneStep", model=(loader, 0), conditioning=(loader, 2), latent=(latent, 0), strength=1.0, **TILES)
    graph.add("PreviewAny", source=(step, 0))
    return "expected (batch, 16, height, width)"


def odd_image(kind, message):
    def make(host, sd3, graph):
        builtin_graph((graph.add("TestOddImage", kind=kind), 0), graph)
        return message

    return make


def odd_prompt(kind, message):
    def make(host, sd3, graph):
        graph, _ = builtin_graph(graph=graph, conditioning=(graph.add("TestPrompt", kind=kind), 0))
        return message

    return make


def several_steps(host, sd3, graph):
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN)
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
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN)
    graph.add(
        "TSDSRSaveCheckpoint", model=(loader, 0), vae=(loader, 1), conditioning=(loader, 2), filename_prefix="../../x",
        dtype="fp16",
    )  # fmt: skip
    return "leads out of the output folder"


def overlap_above_tile(host, sd3, graph):
    builtin_graph(graph=graph, tile=16, tile_overlap=32)
    return "tile_overlap 32 is not below tile 16"


@pytest.mark.parametrize(
    "make",
    [
        wrong_lora, lora_of_another_base, wrong_model, other_channels, several_steps, a_path_upwards, overlap_above_tile,
        odd_image("nan", "NaN or infinite pixels"), odd_image("empty batch", "not empty"), odd_image("text", "expected (batch"),
        odd_prompt("no pooled output", "no pooled output, which SD3 needs"), odd_prompt("area", "'area'"),
        odd_prompt("nothing", "the conditioning is empty"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_the_next_run_works(make, host, sd3):
    graph = Graph()
    message = make(host, sd3, graph)
    result = host.run(graph)
    assert result.status == "error"
    assert message in result.error
    assert len(result.error.strip().splitlines()) == 1
    graph, _ = builtin_graph(strength=0.9)
    assert host.run(graph).status == "success"


def test_out_of_memory_makes_batches_and_tiles_smaller(host):
    settings = {"size.factor": 4.0, "tile": 32, "tile_overlap": 8}
    graph, plain = builtin_graph(**settings)
    loader = next(name for name, node in graph.nodes.items() if node["class_type"] == "TSDSRLoadCheckpoint")
    small = graph.add("TestLittleMemory", model=(loader, 0), cells=16 * 16)
    graph, forced = builtin_graph(graph=graph, model=(small, 0), **settings)
    result = host.run(graph)
    assert result.status == "success", result.error
    log = host.log.read_text()
    assert "out of memory with 4 tiles at once; going on with 2" in log
    assert "out of memory with one tile of 32 latent cells; going on with 16" in log
    difference = np.abs(result.pictures(plain)[0].astype(int) - result.pictures(forced)[0])
    assert 0 < difference.mean() < 3, "smaller tiles see less, and give nearly the same"
    graph, _ = builtin_graph()
    upscale = next(node for node in graph.nodes.values() if node["class_type"] == "TSDSRUpscale")
    upscale["inputs"]["model"] = [graph.add("TestLittleMemory", model=(loader, 0), cells=1), 0]
    assert "out of memory with one tile of 16 latent cells, the least there is: close other programs" in host.run(graph).error


def test_large_pictures_go_through_the_vae_in_tiles(host):
    graph = Graph()
    image = graph.add("LoadImage", image="large.png")
    larger = graph.add("ImageScaleBy", image=(image, 0), upscale_method="bicubic", scale_by=1.5)
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN)
    little = graph.add("TestLittleVae", vae=(loader, 1))
    saves = []
    for vae in ((loader, 1), (little, 0)):
        latent = graph.add("TSDSREncode", image=(larger, 0), vae=vae)
        decoded = graph.add("TSDSRDecode", latent=(latent, 0), vae=vae)
        saves.append(graph.add("SaveImage", images=(decoded, 0), filename_prefix="vae"))
    result = host.run(graph)
    assert result.status == "success", result.error
    whole, tiled = (result.pictures(save)[0].astype(int) for save in saves)
    assert whole.shape == tiled.shape == (768, 768, 3)
    assert 0 < np.abs(whole - tiled).mean() < 4


def test_the_plain_model_and_vae_stay_as_they_are(host, sd3):
    def pictures(strength: float) -> list[np.ndarray]:
        graph = Graph()
        image = graph.add("LoadImage", image="photo.png")
        lora, prompt = load_sd3(graph, vae_strength=strength, transformer_strength=strength)
        plain_model, plain_vae = (tuple(graph.nodes[lora]["inputs"][name]) for name in ("model", "vae"))
        saves = []
        for model, vae in (((lora, 0), (lora, 1)), (plain_model, plain_vae)):
            latent = graph.add("TSDSREncode", image=(image, 0), vae=vae)
            inputs = {"model": model, "conditioning": (prompt, 0), "latent": (latent, 0), "strength": strength}
            decoded = graph.add("TSDSRDecode", latent=(graph.add("TSDSROneStep", **inputs, **TILES), 0), vae=vae)
            saves.append(graph.add("SaveImage", images=(decoded, 0), filename_prefix="plain"))
        result = host.run(graph)
        assert result.status == "success", result.error
        return [result.pictures(save)[0].astype(int) for save in saves]

    first, second = pictures(1.0), pictures(0.999)
    assert np.abs(first[0] - first[1]).max() > 10, "the LoRAs change the picture"
    assert np.abs(first[1] - second[1]).max() <= 2, "but not that of the plain model"


def test_cancel_ends_the_run_soon_and_the_next_one_works(host):
    graph, _ = builtin_graph("large.png", **{"size.factor": 8.0, "strength": 0.77})
    prompt = host.start(graph)
    time.sleep(3)
    assert host.get("/queue")["queue_running"], "the run was over before it could be cancelled"
    start = time.monotonic()
    host.post("/interrupt", {})
    assert host.wait(prompt).status == "interrupted"
    assert time.monotonic() - start < 20
    graph, _ = builtin_graph(strength=0.8)
    assert host.run(graph).status == "success"


def test_fifty_runs_do_not_grow(host):
    sizes = []
    for index in range(50):
        graph, _ = builtin_graph(strength=1 - index / 1000)
        assert host.run(graph).status == "success"
        sizes.append(host.memory())
    assert max(sizes[40:]) < max(sizes[10:20]) + 50e6
    log = host.log.read_text()
    assert log.count("model_type FLOW") < 20, "a model that is there already is not loaded again"
