"""What ``tsdsr train export`` writes, in a real ComfyUI, against the core on diffusers."""

import shutil
from pathlib import Path

import pytest
import torch

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import find_lora, read_bundle
from tsdsr_core.families.load import from_bundle, load
from tsdsr_core.images.files import read_picture
from tsdsr_core.pipeline import Options, restore
from tsdsr_core.weights.prompt import load_prompt

from ...comfyui import host as host_module
from ...comfyui.graphs import CPU, differs, load_sd3, stages
from ...comfyui.host import Graph

SETTINGS = [
    "objective.name=supervised", "run.steps=1", "run.batch=1", "data.crop=32", "run.validate_every=100",
    "optimiser.warmup_steps=0", "optimiser.learning_rate=0.01",
]  # fmt: skip


def train(out: Path, *arguments: object, settings: list[str]) -> Path:
    """One step on the repository's pictures; its checkpoint."""
    photos, configs = host_module.ROOT / "tests" / "data" / "hq", host_module.ROOT / "tsdsr_core" / "train" / "configs"
    command = ["train", configs / "smoke.toml", "--photos", photos, "--out", out, *arguments, "--set", *SETTINGS, *settings]
    assert main([str(part) for part in command]) == 0
    return out / "last.pt"


def export(checkpoint: Path, to: Path) -> None:
    assert main(["train", "export", str(checkpoint), "-o", str(to)]) == 0


def upscaled(host, graph: Graph, **links: tuple) -> object:
    """The photo at its own size, stage by stage."""
    save = stages(graph, name="trained", **links)
    found = host.run(graph)
    assert found.status == "success", found.error
    return found.pictures(save)[0]


def in_core(host, model) -> torch.Tensor:
    low = read_picture(host.base / "input" / "photo.png").rgb
    options = Options(scale=1.0, process_size=0, wavelet_levels=5, tile=16, tile_overlap=4)
    return restore(low, model.model(), options)[0]


def test_exported_loras_run_as_two_files_and_as_a_bundle(host, sd3, tmp_path):
    prompt = ["--embedding-dir", sd3.embeddings]
    checkpoint = train(tmp_path / "run", "--base", sd3.folder, *prompt, settings=["model.trained=lora", "model.rank=4"])
    models = host.base / "models"
    export(checkpoint, bundle := models / "tsdsr" / "trained.safetensors")
    export(checkpoint, tmp_path / "pair")
    shutil.copytree(tmp_path / "pair", models / "loras" / "trained")
    loras = find_lora(bundle, "transformer"), find_lora(bundle, "vae")
    model = load(sd3.folder, loras=loras, prompt=load_prompt(bundle), device=CPU, dtype=torch.float32)
    expected = in_core(host, model)
    plain = in_core(host, load(sd3.folder, loras=(), prompt=load_prompt(bundle), device=CPU, dtype=torch.float32))
    assert (expected - plain).abs().max() > 8 / 255, "the LoRAs change something"
    for files in (["trained.safetensors"] * 2, ["trained/transformer.safetensors", "trained/vae.safetensors"]):
        graph = Graph()
        lora, _ = load_sd3(graph, transformer_lora=files[0], vae_lora=files[1])
        told = graph.add("TSDSRLoadPrompt", prompt="trained.safetensors")
        found = upscaled(host, graph, model=(lora, 0), vae=(lora, 1), conditioning=(told, 0))
        assert differs(found, expected) <= 1


@pytest.mark.parametrize(("layers", "layers_per_block"), [(2, 0), (3, 0), (2, 2)])
def test_an_exported_small_model_runs_at_any_depth(layers, layers_per_block, host, tmp_path):
    depth = [f"model.layers={layers}", f"model.layers_per_block={layers_per_block}"]
    checkpoint = train(tmp_path / "run", settings=["stage=pretrain", *depth])
    export(checkpoint, path := host.base / "models" / "tsdsr" / f"small{layers}{layers_per_block}.safetensors")
    graph = Graph()
    loader = graph.add("TSDSRLoadCheckpoint", checkpoint=path.name, vae_precision="auto")
    found = upscaled(host, graph, model=(loader, 0), vae=(loader, 1), conditioning=(loader, 2))
    assert differs(found, in_core(host, from_bundle(read_bundle(path), CPU, torch.float32))) <= 1
