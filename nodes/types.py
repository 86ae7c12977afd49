"""What the host hands over, as far as the nodes use it: protocols, since a host is not there when types are checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NotRequired, Protocol, Self, TypedDict

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .host.padded_latents import Placement

Conditioning = list[Any]
"""CONDITIONING: pairs of tokens ``(B, N, C)`` and a dictionary with "pooled_output" ``(B, P)`` and more."""


class Latent(TypedDict):
    """LATENT."""

    samples: Tensor
    """``(B, C, h, w)``, unscaled."""
    noise_mask: NotRequired[Tensor]
    tsdsr_vae_factor: NotRequired[int]
    """Pixels per cell; of this pack, as the next."""
    tsdsr_placement: NotRequired[Placement]


class LatentFormat(Protocol):
    """How a model scales latents: ``(z - shift_factor) * scale_factor``."""

    latent_channels: int
    scale_factor: float
    shift_factor: float
    latent_rgb_factors: list[list[float]]
    latent_rgb_factors_bias: list[float]
    taesd_decoder_name: str | None


class BaseModel(Protocol):
    """A diffusion model."""

    diffusion_model: Any
    latent_format: LatentFormat
    model_config: Any
    state_dict_for_saving: Any

    def memory_required(self, input_shape: list[int]) -> float: ...


class Patcher(Protocol):
    """Loads a model where it computes, with patches on its weights."""

    model: Any
    patches: dict[str, list[Any]]
    object_patches: dict[str, Any]
    object_patches_backup: dict[str, Any]
    load_device: torch.device
    cached_patcher_init: Any
    size: int

    def clone(self) -> Self: ...
    def add_patches(self, patches: dict[str, Any], strength_patch: float = 1.0) -> list[str]: ...
    def get_key_patches(self, filter_prefix: str | None = None) -> dict[str, list[Any]]: ...
    def model_state_dict(self) -> dict[str, Tensor]: ...
    def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None: ...


class HostModel(Patcher, Protocol):
    """MODEL."""

    model: BaseModel  # type: ignore[assignment]
    model_options: dict[str, Any]

    def get_model_object(self, name: str) -> Any: ...
    def get_attachment(self, key: str) -> Any: ...
    def set_attachments(self, key: str, attachment: Any) -> None: ...


class Vae(Protocol):
    """VAE."""

    first_stage_model: nn.Module
    patcher: Patcher
    vae_dtype: torch.dtype
    output_device: torch.device
    latent_channels: int
    latent_dim: int
    downscale_ratio: Any
    upscale_ratio: Any

    get_sd: Any

    def model_size(self) -> int: ...
    def spacial_compression_encode(self) -> int: ...
