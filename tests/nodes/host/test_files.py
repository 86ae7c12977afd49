"""Weight files in a real ComfyUI: what the lists offer, what is saved and under which name, and which VAE goes with what."""

import json
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsdsr_core.families.bundle import read_bundle
from tsdsr_core.weights.vae_keys import weights_to_diffusers

from ...comfyui.graphs import BUILTIN, TILES, UPSCALE, core_sd3, load_sd3, stages
from ...comfyui.host import Graph


def choices(host, node: str, name: str) -> list[str]:
    return host.get(f"/object_info/{node}")[node]["input"]["required"][name][1]["options"]


def builtin(graph: Graph) -> str:
    return graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")


def save_builtin(graph: Graph, prefix: str, conditioning: tuple | None = None) -> str:
    loader = builtin(graph)
    return graph.add(
        "TSDSRSaveCheckpoint", model=(loader, 0), vae=(loader, 1), conditioning=conditioning or (loader, 2),
        filename_prefix=prefix, dtype="fp32",
    )  # fmt: skip


def succeed(host, graph: Graph):
    result = host.run(graph)
    assert result.status == "success", result.error
    return result


def fail(host, graph: Graph) -> str:
    result = host.run(graph)
    assert result.status == "error"
    assert len(result.error.strip().splitlines()) == 1, result.error
    return result.error


@pytest.fixture(scope="module")
def prompts(host):
    """Pairs of several names in the host's folders, 64 wide as the built-in model takes them; tokens by name."""
    models = host.base / "models"
    found = {}
    for index, (folder, tokens, pooled) in enumerate(
        [
            ("tsdsr/people", "portrait_prompt_embeds.pt", "portrait_pool_embeds.pt"),
            ("tsdsr/people", "prompt_embeds.pt", "pool_embeds.pt"),
            ("embeddings", "LOUD_PROMPT_EMBEDS.PT", "LOUD_POOL_EMBEDS.PT"),
            ("embeddings", "lonely_prompt_embeds.pt", None),
        ]
    ):
        (models / folder).mkdir(parents=True, exist_ok=True)
        value = torch.full((1, 3, 64), index + 1.0)
        torch.save(value, models / folder / tokens)
        if pooled:
            torch.save(torch.full((1, 64), -index - 1.0), models / folder / pooled)
            found[f"{folder}/{tokens}".split("/", 1)[1]] = index + 1.0
    torch.save(torch.ones(1), models / "embeddings" / "inversion.pt")
    for name in ("one.sft", "TWO.SAFETENSORS"):
        tensors = {"prompt_embeds": torch.full((1, 2, 64), 9.0), "pooled_prompt_embeds": torch.full((1, 64), -9.0)}
        save_file(tensors, models / "embeddings" / name)
        found[name] = 9.0
    (models / "embeddings" / "notes.txt").write_text("no weights")
    return found


def test_the_list_of_prompts_offers_what_loads(host, prompts):
    offered = choices(host, "TSDSRLoadPrompt", "prompt")
    assert set(prompts) <= set(offered)
    assert not {"lonely_prompt_embeds.pt", "inversion.pt", "notes.txt", "people/portrait_pool_embeds.pt"} & set(offered)


@pytest.fixture
def no_files(host):
    """The host without any weight file in its folders."""
    models = host.base / "models"
    folders = [models / name for name in ("loras", "tsdsr", "embeddings") if (models / name).exists()]
    for folder in folders:
        folder.rename(folder.with_name(f"{folder.name} away"))
        folder.mkdir()
    yield
    for folder in folders:
        folder.rmdir()
        folder.with_name(f"{folder.name} away").rename(folder)


def test_an_empty_list_says_what_to_put_where(host, no_files):
    (transformer,) = choices(host, "TSDSRLoadLora", "transformer_lora")
    (vae,) = choices(host, "TSDSRLoadLora", "vae_lora")
    (prompt,) = choices(host, "TSDSRLoadPrompt", "prompt")
    assert "put transformer.safetensors of TSD-SR into models/loras, then press R" in transformer
    assert "put vae.safetensors of TSD-SR into models/loras" in vae
    assert "put prompt_embeds.pt and pool_embeds.pt of TSD-SR into models/tsdsr" in prompt
    graph = Graph()
    graph.add("PreviewAny", source=(graph.add("TSDSRLoadPrompt", prompt=prompt), 0))
    assert fail(host, graph).strip() == f"prompt: {prompt}"
    graph = Graph()
    loader = builtin(graph)
    strengths = {"transformer_strength": 1.0, "vae_strength": 1.0, "vae_precision": "auto"}
    files = {"transformer_lora": transformer, "vae_lora": vae}
    lora = graph.add("TSDSRLoadLora", model=(loader, 0), vae=(loader, 1), **files, **strengths)
    graph.add("PreviewAny", source=(lora, 0))
    assert fail(host, graph).strip() == f"transformer_lora: {transformer}"


def test_the_prompt_that_is_chosen_is_the_one_that_is_loaded(host, prompts):
    graph = Graph()
    saved = {name: save_builtin(graph, "prompts/x", (graph.add("TSDSRLoadPrompt", prompt=name), 0)) for name in sorted(prompts)}
    result = succeed(host, graph)
    for name, node in saved.items():
        prompt = read_bundle(host.base / "output" / result.outputs[node]["text"][0]).prompt
        assert (prompt.tokens == prompts[name]).all(), name
        assert (prompt.pooled == -prompts[name]).all(), name


def test_every_suffix_of_safetensors_is_offered(host, sd3):
    models = host.base / "models"
    lora = load_file(sd3.loras / "vae.safetensors")
    for name in ("suffix.sft", "SUFFIX.SAFETENSORS"):
        save_file(lora, models / "loras" / name)
    torch.save(lora, models / "loras" / "suffix.pt")
    (models / "tsdsr" / "upper.SFT").write_bytes(b"")
    offered = choices(host, "TSDSRLoadLora", "vae_lora")
    assert {"suffix.sft", "SUFFIX.SAFETENSORS"} <= set(offered)
    assert "suffix.pt" not in offered, "nothing reads it"
    assert "upper.SFT" in choices(host, "TSDSRLoadCheckpoint", "checkpoint")
    graph = Graph()
    lora, _ = load_sd3(graph, vae_lora="suffix.sft")
    graph.add("PreviewAny", source=(lora, 0))
    succeed(host, graph)


def test_a_failed_download_is_one_sentence(host, sd3):
    for name in ("web_prompt_embeds.pt", "web_pool_embeds.pt"):
        (host.base / "models" / "tsdsr" / name).write_bytes(b"<html>404")
    graph = Graph()
    graph.add("PreviewAny", source=(graph.add("TSDSRLoadPrompt", prompt="web_prompt_embeds.pt"), 0))
    assert "web_prompt_embeds.pt is a web page, not a PyTorch file" in fail(host, graph)


def test_alpha_in_the_header_is_half_the_strength(host, sd3):
    for part in ("transformer", "vae"):
        header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
        save_file(load_file(sd3.loras / f"{part}.safetensors"), sd3.loras / f"half_{part}.safetensors", header)
    pictures = []
    for changes in (
        {"transformer_lora": "tsdsr/half_transformer.safetensors", "vae_lora": "tsdsr/half_vae.safetensors"},
        {"transformer_strength": 0.5, "vae_strength": 0.5},
        {},
    ):
        graph = Graph()
        lora, prompt = load_sd3(graph, **changes)
        save = stages(graph, (lora, 0), (lora, 1), (prompt, 0), "half")
        pictures.append(succeed(host, graph).pictures(save)[0].astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.abs(pictures[0] - pictures[2]).max() > 5


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("fin/keep/", ["fin/keep/tsdsr_00001_", "fin/keep/tsdsr_00002_"]),
        ("", ["tsdsr_00001_", "tsdsr_00002_"]),
        ("again", ["again_00001_", "again_00002_"]),
        ("a/b/../c", ["a/c_00001_", "a/c_00002_"]),
        ("a/..", ["tsdsr_00001_"]),
        ("named.safetensors", ["named_00001_"]),
        ("win\\dows", ["win/dows_00001_"]),
        ('odd/x:y?z*"|<>', ["odd/x_y_z______00001_"]),
        ("dots. /x. ", ["dots/x_00001_"]),
        ("day/%date:yyyy-MM-dd%", [f"day/{time.strftime('%Y-%m-%d')}_00001_"]),
        ("day/%year%%month%%day%", [f"day/{time.strftime('%Y%m%d')}_00001_"]),
        ("taken/x", ["taken/x_00002_"]),
        ("日本語/é", ["日本語/é_00001_"]),
    ],
)
def test_saving_overwrites_nothing(prefix, names, host):
    output = host.base / "output"
    (output / "taken").mkdir(exist_ok=True)
    (output / "taken" / "x_00001_.safetensors").write_text("mine")
    # Other tests of this host save images and checkpoints of the same prefix, and the host counts them all.
    there = max((int(path.name.split("_")[1]) for path in output.glob("tsdsr_[0-9]*_.*")), default=0)
    for name in names:
        if name.startswith("tsdsr_"):
            there += 1
            name = f"tsdsr_{there:05}_"
        graph = Graph()
        node = save_builtin(graph, prefix)
        graph.nodes[node]["inputs"]["dtype"] = "fp16"
        before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
        shown = succeed(host, graph).outputs[node]["text"][0]
        assert shown == f"{name}.safetensors"
        assert read_bundle(output / shown, "merged")
        assert {path: path.stat().st_mtime_ns for path in before} == before
        host.post("/free", {"free_memory": True})  # or the host takes the same request for done
        time.sleep(0.1)


def test_a_name_that_the_host_does_not_count_is_left_alone(host):
    """The host reads no number from this name, so it begins at 1; there is a file."""
    output = host.base / "output" / "odd names"
    output.mkdir()
    (output / "X_00001_.safetensors").write_text("mine")
    (output / "x_00001_.safetensors").symlink_to("nowhere")
    graph = Graph()
    node = save_builtin(graph, "odd names/x")
    assert succeed(host, graph).outputs[node]["text"][0] == "odd names/x_00002_.safetensors"


@pytest.mark.parametrize("prefix", ["checkpoints/", "checkpoints/mine", "checkpoints/deep/er/"])
def test_the_loader_lists_what_the_node_says(prefix, host):
    graph = Graph()
    node = save_builtin(graph, prefix)
    shown = succeed(host, graph).outputs[node]["text"][0]
    name = shown.removeprefix("checkpoints/")
    assert name in choices(host, "TSDSRLoadCheckpoint", "checkpoint")
    graph = Graph()
    graph.add("PreviewAny", source=(graph.add("TSDSRLoadCheckpoint", checkpoint=name, vae_precision="auto"), 0))
    succeed(host, graph)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("../x", "points outside the output folder"), ("/etc/x", "points outside"), ("C:\\x", "points outside"),
        ("a/../../x", "points outside"),
        ("a" * 300, "longer than 200 bytes"), ("file.txt/x", "file.txt is a file, not a folder"),
    ],
)  # fmt: skip
def test_a_prefix_that_cannot_be_is_one_sentence(prefix, message, host):
    (host.base / "output" / "file.txt").write_text("mine")
    graph = Graph()
    save_builtin(graph, prefix)
    assert message in fail(host, graph)


def expected_vae(sd3) -> dict[str, torch.Tensor]:
    return core_sd3(sd3).vae.state_dict()


def test_a_compiled_vae_takes_the_lora_and_is_saved_under_plain_names(host, sd3):
    graph = Graph()
    lora, _ = load_sd3(graph)
    compiled = graph.add("TestCompiledVae", vae=tuple(graph.nodes[lora]["inputs"]["vae"]))
    graph.nodes[lora]["inputs"]["vae"] = [compiled, 0]
    graph.add("VAESave", vae=(lora, 1), filename_prefix="vae/compiled")
    succeed(host, graph)
    check_vae_weights(load_file(host.base / "output" / "vae" / "compiled_00001_.safetensors"), sd3, 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_stock_vae_save_keeps_the_lora(precision, host, sd3):
    graph = Graph()
    lora, _ = load_sd3(graph, vae_precision=precision)
    graph.add("VAESave", vae=(lora, 1), filename_prefix=f"vae/{precision}")
    succeed(host, graph)
    path = host.base / "output" / "vae" / f"{precision}_00001_.safetensors"
    check_vae_weights(load_file(path), sd3, 1e-5 if precision == "fp32" else 4e-3)
    pictures = []
    for loaded in (False, True):
        graph = Graph()
        image = graph.add("LoadImage", image="photo.png")
        lora, _ = load_sd3(graph, vae_precision=precision)
        vae = (graph.add("VAELoader", vae_name=path.name), 0) if loaded else (lora, 1)
        latent = graph.add("TSDSREncode", image=(image, 0), vae=vae)
        decoded = graph.add("TSDSRDecode", latent=(latent, 0), vae=vae)
        save = graph.add("SaveImage", images=(decoded, 0), filename_prefix="saved")
        pictures.append(succeed(host, graph).pictures(save)[0].astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def check_vae_weights(found: dict[str, torch.Tensor], sd3, tolerance: float) -> None:
    found, expected = weights_to_diffusers(found, 4), expected_vae(sd3)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].float() - value).abs().max() <= tolerance * max(1.0, float(value.abs().max())), name


def test_the_stock_save_after_a_run_keeps_the_lora_once(host, sd3):
    """When the VAE is loaded with its patches, its module holds them already."""
    graph = Graph()
    image = graph.add("LoadImage", image="photo.png")
    lora, _ = load_sd3(graph)
    latent = graph.add("TSDSREncode", image=(image, 0), vae=(lora, 1))
    graph.add("PreviewAny", source=(latent, 0))
    succeed(host, graph)
    graph.add("VAESave", vae=(lora, 1), filename_prefix="vae/after")
    succeed(host, graph)
    check_vae_weights(load_file(host.base / "output" / "vae" / "after_00001_.safetensors"), sd3, 1e-5)


def test_the_stock_checkpoint_save_keeps_both_loras(host, sd3):
    graph = Graph()
    lora, _ = load_sd3(graph)
    clip = graph.add("CheckpointLoaderSimple", ckpt_name="sd3_medium_incl_clips.safetensors")
    graph.add("CheckpointSave", model=(lora, 0), clip=(clip, 1), vae=(lora, 1), filename_prefix="checkpoints/stock")
    succeed(host, graph)
    with safe_open(host.base / "output" / "checkpoints" / "stock_00001_.safetensors", "pt") as file:
        prefix = "first_stage_model."
        found = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    check_vae_weights(found, sd3, 1e-5)


def foreign_vae(host, name: str) -> None:
    """A file that the host takes for another family's VAE by its keys; the weights that are not in it are any."""
    tensors = {"encoder.down.2.downsample.conv.weight": torch.zeros(512, 512, 3, 3)}
    channels = {"flux2": 32, "sd15": 4}[name]
    tensors["decoder.conv_in.weight"] = torch.zeros(512, channels, 3, 3)
    tensors["post_quant_conv.weight"] = torch.zeros(channels, channels, 1, 1)
    if name == "flux2":
        tensors["bn.running_mean"] = torch.zeros(4 * channels)
    save_file(tensors, host.base / "models" / "vae" / f"{name}.safetensors")


def vae_of(graph: Graph, host, kind: str) -> tuple:
    if kind == "built-in":
        return builtin(graph), 1
    if kind == "taesd":
        return graph.add("TestOtherModel"), 1
    if kind in ("flux2", "sd15"):
        foreign_vae(host, kind)
    name = "pixel_space" if kind == "pixel_space" else f"{kind}.safetensors"
    return graph.add("VAELoader", vae_name=name), 0


OWN = "connect the VAE of Stable Diffusion 3, or the VAE output of TSD-SR Load LoRA or TSD-SR Load Checkpoint"


@pytest.mark.parametrize("kind", ["pixel_space", "taesd", "flux2"])
@pytest.mark.parametrize("node", ["TSDSREncode", "TSDSRDecode", "TSDSRUpscale", "TSDSRLoadLora", "TSDSRSaveCheckpoint"])
def test_a_foreign_vae_is_told_which_to_connect(node, kind, host, sd3):
    graph = Graph()
    use(graph, node, vae_of(graph, host, kind), (builtin(graph), 0), (builtin(graph), 2))
    error = fail(host, graph)
    assert OWN in error
    assert ("pixel_space" if kind == "pixel_space" else "the VAE is of another kind (") in error


def use(graph: Graph, node: str, vae: tuple, model: tuple, conditioning: tuple) -> None:
    """A graph in which ``node`` takes the VAE."""
    image = graph.add("LoadImage", image="photo.png")
    if node == "TSDSREncode":
        graph.add("PreviewAny", source=(graph.add(node, image=(image, 0), vae=vae), 0))
    elif node == "TSDSRDecode":
        graph.add("PreviewImage", images=(graph.add(node, latent=(graph.add("TestOddLatent", channels=16), 0), vae=vae), 0))
    elif node == "TSDSRUpscale":
        size = {"size": "scale by", "size.factor": 1.0}
        made = graph.add(node, image=(image, 0), model=model, vae=vae, conditioning=conditioning, **size, **UPSCALE)
        graph.add("PreviewImage", images=(made, 0))
    elif node == "TSDSRLoadLora":
        lora, _ = load_sd3(graph)
        graph.nodes[lora]["inputs"] |= {"vae": list(vae), "model": list(model)}
        graph.add("PreviewAny", source=(lora, 0))
    else:
        graph.add(node, model=model, vae=vae, conditioning=conditioning, filename_prefix="vae check", dtype="fp16")


@pytest.mark.parametrize("node", ["TSDSRUpscale", "TSDSRLoadLora", "TSDSRSaveCheckpoint"])
@pytest.mark.parametrize("model", ["sd3", "built-in"])
def test_the_vae_of_the_other_model_is_noticed(model, node, host, sd3):
    graph = Graph()
    lora, prompt = load_sd3(graph)
    loader = builtin(graph)
    plain = tuple(graph.nodes[lora]["inputs"]["model"]) if node == "TSDSRLoadLora" else (lora, 0)
    own = ((loader, 0), (loader, 2)) if model == "built-in" else (plain, (prompt, 0))
    use(graph, node, vae_of(graph, host, "sd3" if model == "built-in" else "built-in"), *own)
    own, other = {"sd3": (8, 4), "built-in": (4, 8)}[model]
    assert f"the VAE has {other} pixels per latent cell, but the MODEL expects {own}" in fail(host, graph)


@pytest.mark.parametrize(("model", "said"), [("built-in", "8 pixels per latent cell"), ("sd3", "4 pixels per latent cell")])
def test_a_latent_of_the_other_models_vae_is_noticed(model, said, host, sd3):
    graph = Graph()
    image = graph.add("LoadImage", image="photo.png")
    lora, prompt = load_sd3(graph)
    loader = builtin(graph)
    vae, links = ((lora, 1), ((loader, 0), (loader, 2))) if model == "built-in" else ((loader, 1), ((lora, 0), (prompt, 0)))
    latent = graph.add(
        "LatentFlip", samples=(graph.add("TSDSREncode", image=(image, 0), vae=vae), 0), flip_method="x-axis: vertically"
    )
    step = graph.add("TSDSROneStep", model=links[0], conditioning=links[1], latent=(latent, 0), strength=1.0, **TILES)
    graph.add("PreviewAny", source=(step, 0))
    assert said in fail(host, graph)


def test_a_latent_of_another_vae_is_not_decoded(host, sd3):
    graph = Graph()
    image = graph.add("LoadImage", image="photo.png")
    latent = graph.add("TSDSREncode", image=(image, 0), vae=(builtin(graph), 1))
    decoded = graph.add("TSDSRDecode", latent=(latent, 0), vae=(graph.add("VAELoader", vae_name="sd3.safetensors"), 0))
    graph.add("PreviewImage", images=(decoded, 0))
    assert "encoded with 4 pixels per cell, but the VAE has 8" in fail(host, graph)


def test_a_vae_of_other_channels_is_noticed(host, sd3):
    graph = Graph()
    lora, prompt = load_sd3(graph)
    use(graph, "TSDSRUpscale", vae_of(graph, host, "sd15"), (lora, 0), (prompt, 0))
    assert "the VAE has 4 latent channels, but the MODEL expects 16" in fail(host, graph)


def test_a_finetuned_vae_of_the_same_layout_still_works(host, sd3):
    weights = load_file(host.base / "models" / "vae" / "sd3.safetensors")
    weights["decoder.conv_out.bias"] += 0.05
    save_file(weights, host.base / "models" / "vae" / "finetuned.safetensors")
    graph = Graph()
    lora, prompt = load_sd3(graph)
    graph.nodes[graph.nodes[lora]["inputs"]["vae"][0]]["inputs"]["vae_name"] = "finetuned.safetensors"
    stages(graph, (lora, 0), (lora, 1), (prompt, 0), "finetuned")
    succeed(host, graph)
