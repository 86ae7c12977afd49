"""Number types that other packs choose, in a real ComfyUI: torch's default, and that of latents."""

import numpy as np
import pytest

from ...comfyui.graphs import TILES, UPSCALE, load_sd3, stages
from ...comfyui.host import Graph
from .test_files import builtin, succeed


def pictures(host, prefix: str) -> dict[str, list[np.ndarray]]:
    """All nodes that calculate: the step in our node and in a stock one."""
    graph, saves = Graph(), {}

    def save(name: str, image: tuple) -> None:
        saves[name] = graph.add("SaveImage", images=image, filename_prefix=prefix)

    loader = builtin(graph)
    photo, alpha = (graph.add("LoadImage", image=name) for name in ("photo.png", "alpha.png"))
    joined = graph.add("JoinImageWithAlpha", image=(alpha, 0), alpha=(alpha, 1))
    own = {"model": (loader, 0), "vae": (loader, 1), "conditioning": (loader, 2), "size": "scale by", "size.factor": 2.0}
    for fix in ("wavelet", "adain", "lab"):
        fixed = {"color_fix": fix, **({"color_fix.wavelet_levels": 0} if fix == "wavelet" else {})}
        options = {key: value for key, value in UPSCALE.items() if not key.startswith("color_fix")}
        save(fix, (graph.add("TSDSRUpscale", image=(joined, 0), **own, **options, **fixed), 0))
    latent = (graph.add("TSDSREncode", image=(photo, 0), vae=(loader, 1)), 0)
    prompt = {"model": (loader, 0), "conditioning": (loader, 2)}
    step = graph.add("TSDSROneStep", latent=latent, strength=1.0, **prompt, **TILES)
    save("steps", (graph.add("TSDSRDecode", latent=(step, 0), vae=(loader, 1)), 0))
    sampling = {
        "noise": (graph.add("DisableNoise"), 0), "guider": (graph.add("BasicGuider", **prompt), 0),
        "sampler": (graph.add("TSDSRSampler", strength=1.0, **TILES), 0), "latent_image": latent,
        "sigmas": (graph.add("BasicScheduler", model=(loader, 0), scheduler="simple", steps=1, denoise=1.0), 0),
    }  # fmt: skip
    sampled = graph.add("SamplerCustomAdvanced", **sampling)
    save("sampler", (graph.add("TSDSRDecode", latent=(sampled, 0), vae=(loader, 1)), 0))
    result = succeed(host, graph)
    return {name: result.pictures(node) for name, node in saves.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_torchs_default_number_type_changes_nothing(dtype, host, default_dtype):
    expected = pictures(host, f"before {dtype}")
    default_dtype(dtype)
    for name, found in pictures(host, dtype).items():
        for ours, other in zip(found, expected[name], strict=True):
            assert np.array_equal(ours, other), f"{name}: {np.abs(ours.astype(int) - other).max()} levels"


def test_torchs_default_number_type_changes_nothing_in_sd3(host, sd3, default_dtype):
    """With the LoRAs, on what the stock loaders gave before: older hosts round what they load later."""
    found = []
    for dtype in ("float32", "bfloat16"):
        default_dtype("float32")
        graph = Graph()
        lora, prompt = load_sd3(graph)
        inputs = graph.nodes[lora]["inputs"]
        passed = graph.add("TestDefaultDtype", dtype=dtype, model=tuple(inputs["model"]), vae=tuple(inputs["vae"]))
        inputs |= {"model": [passed, 0], "vae": [passed, 1]}
        save = stages(graph, (lora, 0), (lora, 1), (prompt, 0), f"dtypes {dtype}")
        found.append(succeed(host, graph).pictures(save)[0])
    assert np.array_equal(*found)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64", "rounded"])
@pytest.mark.parametrize("where", ["before the step", "after the step", "both"])
def test_a_latent_in_another_number_type_loses_its_padding(where, kind, host):
    graph = Graph()
    loader = builtin(graph)
    latent = graph.add("TSDSREncode", image=(graph.add("LoadImage", image="photo.png"), 0), vae=(loader, 1))
    if where != "after the step":
        latent = graph.add("TestLatentDtype", latent=(latent, 0), kind=kind)
    prompt = {"model": (loader, 0), "conditioning": (loader, 2)}
    latent = graph.add("TSDSROneStep", latent=(latent, 0), strength=1.0, **prompt, **TILES)
    if where != "before the step":
        latent = graph.add("TestLatentDtype", latent=(latent, 0), kind=kind)
    decoded = graph.add("TSDSRDecode", latent=(latent, 0), vae=(loader, 1))
    save = graph.add("SaveImage", images=(decoded, 0), filename_prefix="dtypes")
    assert succeed(host, graph).pictures(save)[0].shape == (44, 52, 3)
