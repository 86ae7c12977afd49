"""The convolutional parts of AlexNet and VGG16, in stages that end where perceptual distances compare features."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import InputError

Name = Literal["alexnet", "vgg16"]
CHANNELS: Mapping[Name, tuple[int, ...]] = {"alexnet": (64, 192, 384, 256, 256), "vgg16": (64, 128, 256, 512, 512)}
"""Output channels of each stage."""
LEAST_SIDE: Mapping[Name, int] = {"alexnet": 31, "vgg16": 16}
"""Minimum side of an image in pixels, for which the last stage has at least one output pixel."""
_ALEXNET = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
"""Input channels, output channels, kernel size, stride and padding of each convolution."""
_VGG16 = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))
"""Channels before, between and after the 3x3 convolutions of each stage."""


class Backbone(nn.ModuleList):
    """Five stages, each a ``Sequential`` ending in the ReLU whose output is compared.

    The input is ``(B, 3, H, W)``, normalised with ImageNet's mean and standard deviation.  Weights are frozen; gradients
    flow to the image.
    """

    def load(self, weights: Mapping[str, Tensor], name: Name) -> None:
        """Load the weights ``NAME.0.weight``, ``NAME.0.bias``, ``NAME.1.weight`` ... in the order of the convolutions."""
        convolutions = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        for index, convolution in enumerate(convolutions):
            state = {part: weights[f"{name}.{index}.{part}"] for part in ("weight", "bias")}
            convolution.load_state_dict(state, assign=True)
        self.requires_grad_(False)


def alexnet() -> Backbone:
    """Single-column AlexNet (Krizhevsky 2014) with a stage for each of its five ReLUs; without weights, on device "meta"."""
    stages = []
    for index, (inputs, outputs, kernel, stride, padding) in enumerate(_ALEXNET):
        pool: list[nn.Module] = [nn.MaxPool2d(3, 2)] if index in (1, 2) else []
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, device="meta")
        stages.append(nn.Sequential(*pool, convolution, nn.ReLU(inplace=True)))
    return Backbone(stages)


def vgg16(pool: Callable[[int], nn.Module] = lambda channels: nn.MaxPool2d(2)) -> Backbone:
    """VGG16 (Simonyan & Zisserman 2015) with stages up to relu1_2, 2_2, 3_3, 4_3 and 5_3; without weights, on device "meta".

    Args:
        pool: makes the layer that halves the size before a stage, given its number of input channels.
    """
    stages = []
    for index, channels in enumerate(_VGG16):
        layers: list[nn.Module] = [pool(channels[0])] if index else []
        for inputs, outputs in itertools.pairwise(channels):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, device="meta"), nn.ReLU(inplace=True)]
        stages.append(nn.Sequential(*layers))
    return Backbone(stages)


BACKBONES: Mapping[Name, Callable[[], Backbone]] = {"alexnet": alexnet, "vgg16": vgg16}


def shapes(name: Name) -> dict[str, torch.Size]:
    """Shapes of a backbone's weights by the names that ``Backbone.load`` uses."""
    convolutions = [module for module in BACKBONES[name]().modules() if isinstance(module, nn.Conv2d)]
    return {
        f"{name}.{index}.{part}": tensor.shape
        for index, convolution in enumerate(convolutions)
        for part, tensor in convolution.named_parameters()
    }


def check_pair(image: Tensor, reference: Tensor, name: Name) -> None:
    """Raise ``InputError`` unless both images have the same shape ``(B, 3, H, W)``, large enough for the backbone."""
    if image.shape != reference.shape:
        raise InputError(f"images of {tuple(image.shape)} and {tuple(reference.shape)} cannot be compared: sizes differ")
    height, width = image.shape[2:]
    if image.shape[1] != 3 or min(height, width) < LEAST_SIDE[name]:
        least = f"{LEAST_SIDE[name]}x{LEAST_SIDE[name]}"
        raise InputError(
            f"an image of {width}x{height} pixels and {image.shape[1]} channels: expected 3 channels and at least {least}"
        )
