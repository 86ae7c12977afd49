"""Draft decode: SD3's latents through the small decoder TAESD3 instead of the VAE."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy.taesd.taesd import TAESD
from torch import Tensor

from ...tsdsr_core.weights.reading import SUFFIXES, check_weights, load_pickle, read_tensors
from ..types import Vae
from . import running
from .files import stamp
from .vae import UNITS, factor_of

_NAME = "taesd3_decoder"
_FACTOR, _CHANNELS = 8, 16
_SCALE, _SHIFT = 1.5305, 0.0609
"""SD3's latents are ``(unscaled - shift) * scale`` for it, as in the host's ``VAELoader.load_taesd``."""
_TILE, _HALO = 128, 19
"""Latent cells. The decoder sees 10 beyond a pixel by its first convolutions, 5, 2.5 and 0.625 by those that follow."""


def _file() -> Path | None:
    names = [name for name in folder_paths.get_filename_list("vae_approx") if name.startswith(_NAME)]
    path = folder_paths.get_full_path("vae_approx", names[0]) if names else None
    return None if path is None else Path(path)


def draft_state(draft: bool | None) -> str:
    """Changes when the decoder's file does; "" without a draft.

    Args:
        draft: None if a link gives the choice.
    """
    path = None if draft is False else _file()
    return "" if path is None else stamp(path)


class Draft:
    """TAESD3 (github.com/madebyollin/taesd), which the host's previews use too."""

    def __init__(self, vae: Vae) -> None:
        """Find and load the weights.

        Raises:
            ValueError: where there are none, they are others, or ``vae`` is not SD3's.
        """
        if (factor_of(vae), vae.latent_channels) != (_FACTOR, _CHANNELS):
            raise ValueError("draft is for the latents of Stable Diffusion 3, and this is another VAE: turn draft off")
        path = _file()
        if path is None:
            folder = folder_paths.folder_names_and_paths["vae_approx"][0][0]
            raise ValueError(
                f"{_NAME}.safetensors is missing in {folder}: get it from github.com/madebyollin/taesd, or turn draft off"
            )
        self._decoder, self._dtype = TAESD(latent_channels=_CHANNELS).taesd_decoder.float(), vae.vae_dtype
        weights = read_tensors(path)[0] if path.suffix.lower() in SUFFIXES else load_pickle(path)
        try:
            check_weights(path, weights)
            self._decoder.load_state_dict(weights)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f"draft: {path} is not the decoder of TAESD3: get it from github.com/madebyollin/taesd") from error

    @torch.inference_mode()
    def decode(self, latents: Tensor, progress: running.NodeProgress) -> Tensor:
        """Unscaled latents ``(B, 16, h, w)`` to pixels ``(B, 3, 8h, 8w)`` in about -1..1, fp32, on their device.

        In tiles with all that the decoder sees around them, so that their size changes nothing.
        """
        decoder = self._decoder.to(latents.device, self._dtype)
        x = ((latents - _SHIFT) * _SCALE).to(self._dtype)
        (height, width), f = x.shape[2:], _FACTOR
        result = latents.new_empty(len(x), 3, height * f, width * f, dtype=torch.float32)
        for top in range(0, height, _TILE):
            for left in range(0, width, _TILE):
                running.check_interrupted()
                above, before = min(top, _HALO), min(left, _HALO)
                tile = decoder(x[:, :, top - above : top + _TILE + _HALO, left - before : left + _TILE + _HALO])
                target = result[:, :, top * f : (top + _TILE) * f, left * f : (left + _TILE) * f]
                target.copy_(tile[:, :, above * f :, before * f :][:, :, : target.shape[2], : target.shape[3]])
        progress.update(len(x) * UNITS)
        return result * 2 - 1
