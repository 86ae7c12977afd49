from typing import Any

import torch
from torch import Tensor, nn

class VAE:
    first_stage_model: nn.Module
    patcher: Any
    vae_dtype: torch.dtype
    output_device: torch.device
    latent_channels: int
    latent_dim: int
    downscale_ratio: Any
    upscale_ratio: Any
    get_sd: Any

    def __init__(
        self, sd: dict[str, Tensor], dtype: torch.dtype | None = None, config: dict[str, Any] | None = None
    ) -> None: ...
    def model_size(self) -> int: ...
    def spacial_compression_encode(self) -> int: ...

def load_diffusion_model_state_dict(sd: dict[str, Tensor], **options: Any) -> Any: ...
