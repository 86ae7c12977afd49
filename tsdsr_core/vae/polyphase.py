"""A 3x3 convolution of a map that was enlarged by 2, computed on the map before that (polyphase decomposition)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def saves_time(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether to compute enlarging and convolution as one: not in 16 bits, where the sums of weights would be rounded, nor on
    other devices than the CPU, where the time has not been measured."""
    return device.type == "cpu" and dtype.itemsize >= 4


class PolyphaseConvolution:
    """Nearest-neighbour enlargement by 2 and then a 3x3 convolution with zeros beyond the border, in 4/9 of the products.

    In the enlarged map neighbours are equal, so a kernel of 3 pixels sees two different values along each side. A kernel of 2
    with the summed weights gives the same: one for even and one for odd pixels, so four along both sides. Exact up to rounding,
    which is less than that of the two steps.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """
        Args:
            weight: ``(C', C, 3, 3)``.
            bias: ``(C',)``, or None.
            dtype: of the maps.
        """
        self.kernels = [_phases(rows, 3) for rows in _phases(weight.to(dtype), 2)]
        self.bias = None if bias is None else bias.to(dtype)

    def __call__(self, tile: Tensor) -> Tensor:
        """``(1, C, H, W)`` to ``(1, C', 2 H, 2 W)``."""
        height, width = tile.shape[2:]
        result = tile.new_empty(1, len(self.kernels[0][0]), 2 * height, 2 * width)
        for row, kernels in enumerate(self.kernels):
            for column, kernel in enumerate(kernels):
                phase = F.conv2d(tile, kernel, self.bias, padding=1)
                result[:, :, row::2, column::2] = phase[:, :, row : row + height, column : column + width]
        return result


def _phases(kernel: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The kernels of two weights along ``axis`` for even and for odd pixels, from a kernel of three."""
    first, middle, last = kernel.unbind(axis)
    return torch.stack((first, middle + last), axis), torch.stack((first + middle, last), axis)
