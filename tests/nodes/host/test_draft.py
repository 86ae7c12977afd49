"""Decoding with TAESD3 in a real ComfyUI, with random weights in the layout of the published ones."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tsdsr_core.images.files import Picture, write_picture

from ...comfyui.graphs import BUILTIN, UPSCALE, load_sd3
from ...comfyui.host import Graph
from ...support.tiny import photo

DECODER = {"blocks": (3, 4, 5, 8, 9, 10, 13, 14, 15, 18), "plain": (7, 12, 17), "first": (1, 16), "last": (19, 3)}
ENCODER = {"blocks": (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), "plain": (2, 6, 10), "first": (0, 3), "last": (14, 16)}
"""Places of the blocks of three convolutions, of the ones without bias, and of the first and last with their channels."""


def weights(layout: dict) -> dict[str, torch.Tensor]:
    """Random ones whose activations neither vanish nor grow; the decoder's results lie about the middle of 0..1."""
    found = {}

    def convolution(name: str, out: int, into: int, gain: float, bias: float | None = 0.0) -> None:
        found[f"{name}.weight"] = torch.randn(out, into, 3, 3) * gain / (9 * into) ** 0.5
        if bias is not None:
            found[f"{name}.bias"] = torch.randn(out) * 0.1 + bias

    for place in layout["blocks"]:
        for part, gain in ((0, 1.4), (2, 1.4), (4, 0.3)):
            convolution(f"{place}.conv.{part}", 64, 64, gain)
    for place in layout["plain"]:
        convolution(str(place), 64, 64, 1.4, None)
    (first, into), (last, out) = layout["first"], layout["last"]
    convolution(str(first), 64, into, 1.4)
    convolution(str(last), out, 64, 0.1, 0.5)
    return found


def graph_of(node: str, **given) -> tuple[Graph, str]:
    """A picture of more than one tile of the draft, encoded and then decoded by a node."""
    graph = Graph()
    lora, _ = load_sd3(graph)
    latent = graph.add("TSDSREncode", image=(graph.add("LoadImage", image="long.png"), 0), vae=(lora, 1))
    if node == "VAEDecode":
        decoded = graph.add(node, samples=(latent, 0), vae=(graph.add("VAELoader", vae_name="taesd3"), 0))
    else:
        decoded = graph.add(node, latent=(latent, 0), vae=(lora, 1), **given)
    return graph, graph.add("SaveImage", images=(decoded, 0), filename_prefix="draft")


@pytest.fixture
def folder(host, sd3):
    """Where the host looks for the weights."""
    write_picture(host.base / "input" / "long.png", Picture(photo(64, 1088)))
    found = host.base / "models" / "vae_approx"
    found.mkdir(exist_ok=True)
    yield found
    for path in found.glob("taesd3*"):
        path.unlink()


def test_a_draft_is_what_the_hosts_own_node_decodes(host, folder):
    """Which decodes in one piece; and it is no decode by the VAE."""
    save_file(weights(DECODER), folder / "taesd3_decoder.safetensors")
    save_file(weights(ENCODER), folder / "taesd3_encoder.safetensors")
    pictures = []
    for node, given in (("VAEDecode", {}), ("TSDSRDecode", {"draft": True}), ("TSDSRDecode", {})):
        graph, save = graph_of(node, **given)
        result = host.run(graph)
        assert result.status == "success", result.error
        pictures.append(result.pictures(save)[0].astype(int))
    (own, draft), (_, whole) = pairwise(pictures)
    assert own.std() > 4
    assert np.abs(draft - own).max() <= 1
    assert np.abs(draft - whole).mean() > 4


@pytest.mark.parametrize("node", ["TSDSRDecode", "TSDSRUpscale"])
def test_what_a_draft_lacks_is_named(host, folder, node):
    def said(**loaded) -> str:
        graph = Graph()
        if loaded.get("builtin"):
            loader = graph.add("TSDSRLoadCheckpoint", checkpoint=BUILTIN, vae_precision="auto")
            model, vae, prompt = ((loader, output) for output in range(3))
        else:
            lora, text = load_sd3(graph)
            model, vae, prompt = (lora, 0), (lora, 1), (text, 0)
        image = graph.add("LoadImage", image="photo.png")
        if node == "TSDSRDecode":
            latent = graph.add("TSDSREncode", image=(image, 0), vae=vae)
            result = graph.add(node, latent=(latent, 0), vae=vae, draft=True)
        else:
            given = {"model": model, "conditioning": prompt, "size": "scale by", "size.factor": 2.0, **UPSCALE}
            result = graph.add(node, image=(image, 0), vae=vae, draft=True, **given)
        graph.add("SaveImage", images=(result, 0), filename_prefix="draft")
        return host.run(graph).error

    assert f"taesd3_decoder.safetensors is missing in {folder}" in said()
    assert "draft is for the latents of Stable Diffusion 3" in said(builtin=True)
    save_file({"other": torch.ones(1)}, folder / "taesd3_decoder.safetensors")
    assert "is not the decoder of TAESD3" in said()
    for damage, expected in ((b"", "is empty"), (b"<html>404", "is a web page")):
        (folder / "taesd3_decoder.safetensors").write_bytes(damage)
        assert f"taesd3_decoder.safetensors {expected}" in said()
    damaged = weights(DECODER)
    next(iter(damaged.values())).view(-1)[0] = torch.nan
    save_file(damaged, folder / "taesd3_decoder.safetensors")
    assert "taesd3_decoder.safetensors has NaN or infinite values" in said()
    (folder / "taesd3_decoder.safetensors").unlink()
    (folder / "taesd3_decoder.pth").write_bytes(b"<html>404")
    assert "taesd3_decoder.pth is a web page" in said()


def test_a_replaced_decoder_is_read_again(host, folder):
    graph, save = graph_of("TSDSRDecode", draft=True)
    pictures = []
    for gain in (1.0, 0.5):
        changed = {name: gain * tensor for name, tensor in weights(DECODER).items()}
        save_file(changed, folder / "taesd3_decoder.safetensors")
        pictures.append(host.run(graph).pictures(save)[0].astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() > 4


def test_torchs_default_number_type_changes_no_draft(host, folder, default_dtype):
    save_file(weights(DECODER), folder / "taesd3_decoder.safetensors")
    found = []
    for dtype in ("float32", "bfloat16"):
        default_dtype("float32")
        graph, save = graph_of("TSDSRDecode", draft=True)
        inputs = next(node["inputs"] for node in graph.nodes.values() if node["class_type"] == "TSDSRLoadLora")
        passed = graph.add("TestDefaultDtype", dtype=dtype, model=tuple(inputs["model"]), vae=tuple(inputs["vae"]))
        inputs |= {"model": [passed, 0], "vae": [passed, 1]}
        result = host.run(graph)
        assert result.status == "success", result.error
        found.append(result.pictures(save)[0])
    assert np.array_equal(*found)
