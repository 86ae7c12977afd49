"""Bundles of the published layout's tiny models, and changed copies of bundles."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import METADATA_KEY, read_description

from .tiny import Published


def merged_bundles(published: Published, folder: Path, option: str) -> dict[str, Path]:
    """The paths of one model's bundles in fp16: "whole" and "fold", and both with ``option``, such as "whole int8"."""
    source = ["--model", published.sd3, "--lora-dir", published.loras, "--embedding-dir", published.embeddings]
    made = {}
    for name in ("whole", "fold", f"whole {option}", f"fold {option}"):
        made[name] = folder / f"{name}.safetensors"
        options = [f"--{part}" for part in name.split() if part != "whole"]
        assert main([str(a) for a in ["bundle", "--merge", *options, *source, "-o", made[name]]]) == 0
    return made


def rewrite(source: Path, target: Path, changes: dict[str, Tensor | None] | None = None, **description) -> Path:
    """Copy a bundle with other tensors, without those that are None, or with another description."""
    found = json.dumps({**read_description(source), **description})
    tensors = {key: tensor for key, tensor in {**load_file(source), **(changes or {})}.items() if tensor is not None}
    save_file(tensors, target, {METADATA_KEY: found})
    return target
