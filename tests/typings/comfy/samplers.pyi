from collections.abc import Callable
from typing import Any

from torch import Tensor

class Sampler: ...

class CFGGuider:
    model_options: dict[str, Any]

    def __init__(self, model_patcher: Any) -> None: ...
    def inner_set_conds(self, conds: dict[str, Any]) -> None: ...
    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Sampler,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable[[int, Tensor, Tensor, int], None] | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Tensor: ...
