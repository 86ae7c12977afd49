from typing import Any

class SD3:
    diffusion_model: Any
    latent_format: Any
    model_config: Any

    def memory_required(self, input_shape: list[int]) -> float: ...
