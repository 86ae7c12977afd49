"""Grid penalty: a loss on patterns that repeat with a model's own cells, such as a grid of 8 pixels."""

from __future__ import annotations

from torch import Tensor

from ...metrics.fidelity import local_statistics

PERIOD = 16
"""Pixels of a transformer patch; a latent cell has 8, and a pattern with period 8 also has period 16."""
_LEVEL = 1 / 255


def periodic_error(image: Tensor, reference: Tensor) -> Tensor:
    """Strength of the part of the error that repeats every 16 pixels; other errors average out.

    A perceptual distance rewards texture, and a pattern of the model's own cells is the cheapest texture to make.  It is
    faint and visible in smooth areas, so the error is measured as a local contrast, as in ``metrics.spectrum.grid_peaks``:
    its fine part divided by the local standard deviation of the image.  With ``m(i, j)`` the mean of that contrast at
    position ``(i, j)`` of the cell, over the batch and all cells, by channel, the result is ``sqrt(mean((m - mean(m))^2))``.

    Args:
        image, reference: ``(B, C, H, W)`` in 0..1, sides multiples of 16; cells start at the top left pixel.
    """
    batch, channels, height, width = image.shape
    error, shown = ((values.float().flatten(0, 1)[:, None]) for values in (image - reference, image.detach()))
    fine = error - local_statistics(error)[0]
    cells = (fine / (local_statistics(shown)[1] + _LEVEL)).view(
        batch, channels, height // PERIOD, PERIOD, width // PERIOD, PERIOD
    )
    pattern = cells.mean((0, 2, 4))
    pattern = pattern - pattern.mean((1, 2), keepdim=True)
    return (pattern.square().mean() + 1e-8).sqrt()
