from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

def get_previewer(device: torch.device, latent_format: Any) -> Any: ...
def prepare_callback(model: Any, steps: int) -> Callable[[int, Tensor, Tensor, int], None]: ...
