"""What templates and blueprint rely on, in a real host: LoRAs that blend, and the colour fix that suits either model."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tsdsr_core.families.bundle import BUILTIN as BUILTIN_FILE
from tsdsr_core.families.bundle import read_bundle

from ...comfyui.graphs import BUILTIN, load_sd3, stages
from ...comfyui.host import Graph


def blended(folder, share: float) -> None:
    """LoRA files of twice the rank, whose changes of the weights are ``share`` of tsdsr and the rest of tsdsr-mse."""
    (folder / "blend").mkdir()
    for name in ("transformer", "vae"):
        first, second = (load_file(folder / pair / f"{name}.safetensors") for pair in ("tsdsr", "tsdsr-mse"))
        joined = {}
        for key, tensor in first.items():
            up = "lora_B" in key
            parts = (share * tensor, (1 - share) * second[key]) if up else (tensor, second[key])
            joined[key] = torch.cat(parts, 1 if up else 0)
        save_file(joined, folder / "blend" / f"{name}.safetensors")


def test_two_loaders_in_a_row_blend_the_changes_of_the_weights(host, sd3):
    share = 0.25
    blended(host.base / "models" / "loras", share)
    graph = Graph()
    first, prompt = load_sd3(graph, transformer_strength=share, vae_strength=share)
    pair = {"transformer_lora": "tsdsr-mse/transformer.safetensors", "vae_lora": "tsdsr-mse/vae.safetensors"}
    rest = {"transformer_strength": 1 - share, "vae_strength": 1 - share, "vae_precision": "fp32"}
    second = graph.add("TSDSRLoadLora", model=(first, 0), vae=(first, 1), **pair, **rest)
    names = {"transformer_lora": "blend/transformer.safetensors", "vae_lora": "blend/vae.safetensors"}
    whole, _ = load_sd3(graph, **names)
    alone, _ = load_sd3(graph)
    saved = [stages(graph, (lora, 0), (lora, 1), (prompt, 0), "dial") for lora in (second, whole, alone)]
    result = host.run(graph)
    assert result.status == "success", result.error
    dial, expected, tsdsr = (result.pictures(save)[0].astype(int) for save in saved)
    assert np.abs(dial - expected).max() <= 1
    assert np.abs(dial - tsdsr).max() > 3, "or there would be nothing to blend"


@pytest.mark.parametrize("connected", [True, False])
def test_the_colour_fix_takes_the_levels_that_suit_the_model(connected, host):
    levels = read_bundle(BUILTIN_FILE).defaults["wavelet_levels"] if connected else 5
    assert levels != 5 or not connected, "else this shows nothing"
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
    image, reference = (graph.add("LoadImage", image=name) for name in ("large.png", "photo.png"))
    model = {"model": (loader, 0)} if connected else {}
    sources = {"image": (image, 0), "reference": (reference, 0), "color_fix": "wavelet"}
    fixed = [
        graph.add("TSDSRColorFix", **sources, **{"color_fix.wavelet_levels": chosen}, **(model if chosen == 0 else {}))
        for chosen in (0, levels, 2)
    ]
    saved = [graph.add("SaveImage", images=(each, 0), filename_prefix=f"levels-{connected}") for each in fixed]
    result = host.run(graph)
    assert result.status == "success", result.error
    automatic, explicit, other = (result.pictures(save)[0] for save in saved)
    assert (automatic == explicit).all()
    assert (automatic != other).any()
