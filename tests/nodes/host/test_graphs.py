"""The nodes in a real ComfyUI, against the core on diffusers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tsdsr_core.alpha import spread_colours
from tsdsr_core.colour import match_colour
from tsdsr_core.families.bundle import read_bundle, write_bundle
from tsdsr_core.families.load import from_bundle, load, merged_bundle
from tsdsr_core.families.sd3.fold import fold
from tsdsr_core.images.files import read_picture
from tsdsr_core.metrics.fidelity import psnr_y
from tsdsr_core.pipeline import Options, bicubic, restore
from tsdsr_core.video.reading import read_clip
from tsdsr_core.weights.prompt import POOLED_KEY, TOKENS_KEY, load_prompt

from ...comfyui import host as host_module
from ...comfyui.graphs import BUILTIN, CPU, TILES, UPSCALE, builtin_graph, core_sd3, differs, load_sd3, stages
from ...comfyui.host import Graph


def test_the_first_workflow_improves_a_real_photo(host):
    graph = Graph()
    first = min((host_module.ROOT / "workflows" / "api").glob("*.json"))
    graph.nodes = json.loads(first.read_text(encoding="utf-8"))
    for node in graph.nodes.values():
        if node["class_type"] == "LoadImage":
            node["inputs"]["image"] = "lighthouse.png"
        if node["class_type"] == "TSDSRUpscale":
            node["inputs"]["size.factor"] = 4.0
    result = host.run(graph)
    assert result.status == "success", result.error
    save = next(name for name, node in graph.nodes.items() if node["class_type"] == "SaveImage")
    restored = torch.from_numpy(result.pictures(save)[0] / 255.0).permute(2, 0, 1)[None].float()
    data = host_module.ROOT / "tests" / "data"
    low, high = (read_picture(data / folder / "lighthouse.png").rgb for folder in ("lq-light", "hq"))
    assert psnr_y(restored, high) > psnr_y(bicubic(low, high.shape[2:]), high) + 0.2


@pytest.mark.rounding
def test_the_built_in_model_gives_what_the_core_gives(host):
    graph, save = builtin_graph()
    result = host.run(graph)
    assert result.status == "success", result.error
    model = load("builtin", device=CPU, dtype=torch.float32)
    low = read_picture(host.base / "input" / "photo.png").rgb
    expected = restore(low, model.model(), Options(scale=2.0, **model.defaults))
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
    return restore(low, core_sd3(sd3).model(), options)[0]


@pytest.mark.parametrize("way", ["node", "sampler"])
def test_sd3_with_loras_gives_what_the_core_gives(way, modular, expected):
    result, saves, _ = modular
    assert differs(result.pictures(saves[way])[0], expected) <= 1


def test_the_vae_changes_its_type_for_the_lora(host, sd3, expected):
    graph = Graph()
    lora, prompt = load_sd3(graph, vae_precision="fp16")
    save = stages(graph, (lora, 0), (lora, 1), (prompt, 0), "fp16")
    result = host.run(graph)
    assert result.status == "success", result.error
    found = result.pictures(save)[0].astype(float)
    exact = np.floor(expected.permute(1, 2, 0).numpy() * 255)
    assert 0 < np.abs(found - exact).mean() < 1.5, "rounded, but the same picture"


def test_a_saved_checkpoint_holds_the_merged_model(modular, expected, host):
    model = from_bundle(read_bundle(modular[2]), CPU, torch.float32)
    low = read_picture(host.base / "input" / "photo.png").rgb
    found = restore(low, model.model(), Options(scale=1.0, process_size=0, tile=16, tile_overlap=4))[0]
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("folded", [False, True])
def test_a_bundle_made_by_the_core_runs_natively(folded, host, sd3, expected):
    model = core_sd3(sd3)
    if folded:
        fold(model.transformer, model.prompt.pooled)
    path = host.base / "models" / "tsdsr" / "merged.safetensors"
    defaults = {"process_size": 0, "wavelet_levels": 5}
    write_bundle(path, merged_bundle(model.transformer, model.vae, model.prompt, torch.float32, defaults, {}))
    graph = Graph()
    image = graph.add("LoadImage", image="photo.png")
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint="merged.safetensors", vae_precision="auto")
    inputs = {"model": (loader, 0), "vae": (loader, 1), "conditioning": (loader, 2), "size": "scale by", "size.factor": 1.0}
    result = graph.add("TSDSRUpscale", image=(image, 0), **{**inputs, **UPSCALE, **TILES})
    save = graph.add("SaveImage", images=(result, 0), filename_prefix="bundle")
    found = host.run(graph)
    assert found.status == "success", found.error
    assert differs(found.pictures(save)[0], expected) <= 1


@pytest.mark.parametrize("path", sorted((host_module.ROOT / "workflows" / "api").glob("*.json")), ids=lambda path: path.stem)
def test_every_example_workflow_runs(path, host, sd3):
    """As it stands, but for fewer steps and pixels of the text to image; SD3 has random weights, and runs at its size once."""
    graph = Graph()
    graph.nodes = json.loads(path.read_text())
    for node in list(graph.nodes.values()):
        if node["class_type"] == "TSDSRUpscale" and "SD3" in path.stem and " 02 " not in path.stem:
            graph.nodes["small"] = {"class_type": "TestSmallModel", "inputs": {"model": node["inputs"]["model"]}}
            node["inputs"]["model"] = ["small", 0]
        if node["class_type"] == "EmptySD3LatentImage":
            node["inputs"] |= {"width": 64, "height": 64}
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    result = host.run(graph, 900)
    assert result.status == "success", result.error
    save, kind = next((name, node["class_type"]) for name, node in graph.nodes.items() if node["class_type"].startswith("Save"))
    if kind == "SaveVideo":
        (saved,) = result.outputs[save]["images"]
        before = read_clip(host.base / "input" / "tsdsr_clip.mp4")
        after = read_clip(host.base / "output" / saved["subfolder"] / saved["filename"])
        assert (after.frames, after.height, after.width) == (before.frames, 4 * before.height, 4 * before.width)
        return
    sizes = {"folder": {(64, 80), (84, 68)}, "text to image": {(128, 128)}, "grainy": {(80, 64)}}
    expected = next((size for key, size in sizes.items() if key in path.stem.lower()), {(64, 80)})
    assert {picture.shape[:2] for picture in result.pictures(save)} == expected


def test_latents_of_odd_sides_keep_their_size(host):
    """The transformer works on patches of two cells; a preview is made of every batch of tiles all the same."""
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
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


@pytest.mark.parametrize("soft", [0.0, 1.0])
def test_a_transparent_edge_has_no_fringe(soft, host):
    """White over hidden black, judged over white, grey and black."""
    graph = Graph()
    graph, save = builtin_graph((graph.add("TestDisc", soft=soft, hidden=0.0), 0), graph, **{"size.factor": 4.0})
    result = host.run(graph)
    assert result.status == "success", result.error
    picture = result.pictures(save)[0].astype(float)
    rgb, alpha = picture[..., :3], picture[..., 3:] / 255
    assert picture.shape == (192, 192, 4)
    for background in (255, 128, 0):
        found, wanted = (colour * alpha + background * (1 - alpha) for colour in (rgb, 255))
        assert np.abs(found - wanted).max() <= 5, background


def test_what_transparency_hides_changes_nothing(host):
    """Neither what is encoded, nor a colour fix from it, nor the result."""
    graph, saves = Graph(), []
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    photo = graph.add("ImageScale", image=(graph.add("LoadImage", image="photo.png"), 0), upscale_method="area", width=48,
                      height=48, crop="center")  # fmt: skip
    for hidden in (0.0, 0.7):
        disc = graph.add("TestDisc", soft=2.0, hidden=hidden)
        latent = graph.add("TSDSREncode", image=(disc, 0), vae=(loader, 1))
        decoded = graph.add("TSDSRDecode", latent=(latent, 0), vae=(loader, 1))
        fixes = [(photo, disc), (disc, photo)]
        fixed = [graph.add("TSDSRColorFix", image=(a, 0), reference=(b, 0), color_fix="adain") for a, b in fixes]
        saves.append([graph.add("SaveImage", images=(node, 0), filename_prefix="hidden") for node in (decoded, *fixed)])
    result = host.run(graph)
    assert result.status == "success", result.error
    for one, other in zip(*saves, strict=True):
        assert np.array_equal(result.pictures(one)[0], result.pictures(other)[0])


@pytest.mark.rounding
def test_images_of_a_batch_do_not_touch_each_other(host):
    graph = Graph()
    photo = graph.add("LoadImage", image="photo.png")
    inverted = graph.add("ImageInvert", image=(photo, 0))
    saved = []
    for neighbour in (photo, inverted):
        batch = graph.add("ImageBatch", image1=(neighbour, 0), image2=(inverted, 0))
        graph, save = builtin_graph((batch, 0), graph)
        saved.append(save)
    graph, alone = builtin_graph((inverted, 0), graph)
    together, single = (tuple(graph.nodes[save]["inputs"]["images"]) for save in (saved[0], alone))
    last = graph.add("ImageFromBatch", image=together, batch_index=1, length=1)
    told = graph.add("TestDifference", one=(last, 0), other=single)
    result = host.run(graph)
    assert result.status == "success", result.error
    (beside_photo, first), (beside_itself, second) = (result.pictures(save) for save in saved)
    assert np.array_equal(first, second), "the same batch but for the neighbour: the same operations, to the bit"
    assert not np.array_equal(beside_photo, beside_itself)
    difference = float(result.outputs[told]["text"][0])
    assert difference < 1e-4, "other kernels for other batch sizes: 2e-6 at most; one level of 8 bits is 4e-3"


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


@pytest.mark.parametrize("own", ["built-in", "sd3"])
def test_encode_and_decode_give_what_one_piece_gives(own, host, sd3):
    """Against ComfyUI's own VAE nodes, which take the picture whole."""
    graph = Graph()
    image = graph.add("LoadImage", image="large.png")
    if own == "sd3":
        image = graph.add("ImageScaleBy", image=(image, 0), upscale_method="area", scale_by=0.5)
        vae = (graph.add("VAELoader", vae_name="sd3.safetensors"), 0)
    else:
        vae = (graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto"), 1)
    saves = []
    for encode, decode, samples in (("VAEEncode", "VAEDecode", "samples"), ("TSDSREncode", "TSDSRDecode", "latent")):
        pixels = {"pixels" if encode == "VAEEncode" else "image": (image, 0)}
        latent = graph.add(encode, vae=vae, **pixels)
        decoded = graph.add(decode, vae=vae, **{samples: (latent, 0)})
        saves.append(graph.add("SaveImage", images=(decoded, 0), filename_prefix="vae"))
    result = host.run(graph)
    assert result.status == "success", result.error
    whole, tiled = (result.pictures(save)[0].astype(int) for save in saves)
    assert whole.std() > 1
    assert np.abs(whole - tiled).max() <= 1, "rounding to 8 bit"


def test_a_lora_wakes_an_idle_attention_at_its_first_run(host, sd3):
    """One whose output projection is zero but for the LoRA, which the host adds when it loads the VAE."""
    weights = load_file(host.base / "models" / "vae" / "sd3.safetensors")
    for name in ("weight", "bias"):
        weights[f"encoder.mid_block.attentions.0.to_out.0.{name}"].zero_()
    save_file(weights, host.base / "models" / "vae" / "idle.safetensors")
    pictures = []
    for encode, pixels in (("TSDSREncode", "image"), ("VAEEncode", "pixels")):
        graph = Graph()
        image = graph.add("LoadImage", image="photo.png")
        image = graph.add("ImageScale", image=(image, 0), upscale_method="area", width=64, height=48, crop="center")
        lora, _ = load_sd3(graph, vae_strength=2.0)
        graph.nodes[graph.nodes[lora]["inputs"]["vae"][0]]["inputs"]["vae_name"] = "idle.safetensors"
        latent = graph.add(encode, vae=(lora, 1), **{pixels: (image, 0)})
        decoded = graph.add("VAEDecode", vae=(lora, 1), samples=(latent, 0))
        save = graph.add("SaveImage", images=(decoded, 0), filename_prefix="idle")
        result = host.run(graph)
        assert result.status == "success", result.error
        pictures.append(result.pictures(save)[0].astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1, "rounding to 8 bit"


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


def test_a_saved_checkpoint_runs_natively(modular, expected, host):
    _, _, path = modular
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=path.name, vae_precision="auto")
    save = stages(graph, (loader, 0), (loader, 1), (loader, 2), "saved")
    result = host.run(graph)
    assert result.status == "success", result.error
    assert differs(result.pictures(save)[0], expected) <= 1


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_checkpoint_is_saved_in_the_chosen_type(name, dtype, host):
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    bundle = graph.add(
        "TSDSRSaveCheckpoint", model=(loader, 0), vae=(loader, 1), conditioning=(loader, 2), filename_prefix=f"typed/{name}",
        dtype=name,
    )  # fmt: skip
    result = host.run(graph)
    assert result.status == "success", result.error
    found = load_file(host.base / "output" / result.outputs[bundle]["text"][0])
    assert {tensor.dtype for key, tensor in found.items() if not key.startswith("vae.")} == {dtype}
    assert {tensor.dtype for key, tensor in found.items() if key.startswith("vae.")} == {torch.float16}, "bf16 is too coarse"


def test_a_vae_in_bf16_is_made_finer_for_the_lora(host, sd3):
    graph = Graph()
    lora, _ = load_sd3(graph, vae_precision="auto")
    vae = graph.nodes[lora]["inputs"]["vae"]
    graph.nodes[lora]["inputs"]["vae"] = [graph.add("TestCoarseVae", vae=tuple(vae)), 0]
    said = graph.add("TestTypeOfVae", vae=(lora, 1))
    result = host.run(graph)
    assert result.status == "success", result.error
    assert result.outputs[said]["text"] == ["torch.float32"], "on the CPU; fp16 on a GPU"
    assert "start ComfyUI with --fp16-vae" in host.log.read_text()


def under_prompt(graph: Graph, lora: str, conditioning: str, name: str) -> str:
    """One step on a small latent; the node that saves it under ``name``, which no other test uses."""
    latent = graph.add("TestOddLatent", channels=16)
    step = graph.add("TSDSROneStep", model=(lora, 0), conditioning=(conditioning, 0), latent=(latent, 0), strength=1.0, **TILES)
    decoded = graph.add("TSDSRDecode", latent=(step, 0), vae=(lora, 1))
    return graph.add("SaveImage", images=(decoded, 0), filename_prefix=name)


def test_stock_text_encoding_works_in_place_of_the_prompt(host, sd3):
    """And the text matters: from a file without a text encoder that it knows, the host makes the same zeros of all texts."""
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", ckpt_name="sd3_medium_incl_clips.safetensors")
    texts = ("a photograph of a lighthouse, sharp", "a watercolour of three parrots")
    lora, prompt = load_sd3(graph)
    prompts = [*(graph.add("CLIPTextEncode", clip=(loader, 1), text=text) for text in texts), prompt]
    saves = [under_prompt(graph, lora, conditioning, "text") for conditioning in prompts]
    result = host.run(graph)
    assert result.status == "success", result.error
    lighthouse, parrots, own = (result.pictures(save)[0].astype(int) for save in saves)
    assert (lighthouse != parrots).any(), "another text gives another picture"
    assert (lighthouse != own).any(), "another prompt gives another picture"


def test_the_prompt_may_be_one_safetensors_file(host, sd3):
    prompt = load_prompt(sd3.embeddings)
    tensors = {TOKENS_KEY: prompt.tokens, POOLED_KEY: prompt.pooled}
    save_file(tensors, host.base / "models" / "tsdsr" / "one.safetensors")
    graph = Graph()
    lora, pair = load_sd3(graph)
    single = graph.add("TSDSRLoadPrompt", prompt="one.safetensors")
    saves = [under_prompt(graph, lora, conditioning, "single") for conditioning in (single, pair)]
    result = host.run(graph)
    assert result.status == "success", result.error
    assert np.array_equal(*(result.pictures(save)[0] for save in saves))


def test_a_prompt_is_pruned_where_asked(host, sd3):
    graph = Graph()
    lora, whole = load_sd3(graph)
    saves = [under_prompt(graph, lora, whole, "pruned")]
    for count in (9, 3):
        prompt = graph.add("TSDSRLoadPrompt", prompt="default/prompt_embeds.pt", prompt_tokens=count)
        saves.append(under_prompt(graph, lora, prompt, "pruned"))
    result = host.run(graph)
    assert result.status == "success", result.error
    whole, all_of_nine, three = (result.pictures(save)[0].astype(int) for save in saves)
    assert np.array_equal(whole, all_of_nine)
    assert (whole != three).any()


@pytest.mark.parametrize("covered", [0.0, 1.0])
def test_a_noise_mask_limits_where_the_step_acts(covered, host):
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    latent = graph.add("TestOddLatent", channels=16)
    mask = graph.add("SolidMask", value=covered, width=28, height=36)
    masked = graph.add("SetLatentNoiseMask", samples=(latent, 0), mask=(mask, 0))
    pictures = []
    for samples, strength in ((masked, 1.0), (latent, covered)):
        step = graph.add(
            "TSDSROneStep", model=(loader, 0), conditioning=(loader, 2), latent=(samples, 0), strength=strength, **TILES
        )
        decoded = graph.add("TSDSRDecode", latent=(step, 0), vae=(loader, 1))
        pictures.append(graph.add("SaveImage", images=(decoded, 0), filename_prefix="mask"))
    result = host.run(graph)
    assert result.status == "success", result.error
    assert np.array_equal(*(result.pictures(save)[0] for save in pictures))


@pytest.mark.parametrize("method", ["adain", "lab", "none"])
def test_the_colour_fix_is_the_cores_and_keeps_alpha(method, host):
    graph = Graph()
    image = graph.add("LoadImage", image="alpha.png")
    joined = graph.add("JoinImageWithAlpha", image=(image, 0), alpha=(image, 1))
    reference = graph.add("LoadImage", image="photo.png")
    fixed = graph.add("TSDSRColorFix", image=(joined, 0), reference=(reference, 0), color_fix=method)
    save = graph.add("SaveImage", images=(fixed, 0), filename_prefix=method)
    result = host.run(graph)
    assert result.status == "success", result.error
    found = result.pictures(save)[0]
    content, style = (read_picture(host.base / "input" / f"{name}.png") for name in ("alpha", "photo"))
    visible = spread_colours(content.rgb, content.alpha)
    expected = match_colour(visible, bicubic(style.rgb, content.rgb.shape[2:]), method, 5).clamp(0, 1)
    assert differs(found[..., :3], expected[0]) <= 1
    assert np.abs(found[..., 3].astype(int) - (content.alpha[0, 0].numpy() * 255).astype(int)).max() <= 1
