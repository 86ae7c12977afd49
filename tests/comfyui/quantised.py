"""Quantised bundles where a ComfyUI finds them, and one photo restored with them there and by the core."""

from pathlib import Path

import torch
from torch import Tensor

from tsdsr_core.families.bundle import write_bundle
from tsdsr_core.families.load import merged_bundle
from tsdsr_core.families.restorer import Restorer
from tsdsr_core.families.sd3.fold import fold
from tsdsr_core.images.files import read_picture
from tsdsr_core.pipeline import Options, restore

from .graphs import TILES, UPSCALE
from .host import Graph, Host

OPTIONS = Options(scale=1.0, process_size=0, tile=16, tile_overlap=4)


def write(host: Host, model: Restorer, name: str, folded: bool, quantised) -> Path:
    """A bundle of ``model`` in fp16 with matrices "float8" or "int8"."""
    if folded:
        fold(model.transformer, model.prompt.pooled)
    path = host.base / "models" / "tsdsr" / f"{name}.safetensors"
    defaults = {"process_size": 0, "wavelet_levels": 5}
    write_bundle(path, merged_bundle(model.transformer, model.vae, model.prompt, torch.float16, defaults, {}, quantised))
    return path


def load_node(graph: Graph, path: Path) -> str:
    """The node that loads a bundle."""
    return graph.add("TSDSRLoadCheckpoint", checkpoint=path.name, vae_precision="fp32")


def upscale(graph: Graph, loader: str, model: tuple[str, int], name: str) -> str:
    """Restore the photo in its own size; the node that saves it."""
    image = graph.add("LoadImage", image="photo.png")
    given = {"model": model, "vae": (loader, 1), "conditioning": (loader, 2), "size": "scale by", "size.factor": 1.0}
    result = graph.add("TSDSRUpscale", image=(image, 0), **{**given, **UPSCALE, **TILES})
    return graph.add("SaveImage", images=(result, 0), filename_prefix=name)


def core(host: Host, model: Restorer) -> Tensor:
    """What the core makes of the same photo."""
    return restore(read_picture(host.base / "input" / "photo.png").rgb, model.model(), OPTIONS)[0]
