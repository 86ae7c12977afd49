"""One-step super-resolution with TSD-SR (Dong et al., CVPR 2025): the method, without any host application.

``pipeline``    image in, restored image out; start here  ``families``  what loads, as a ``Restorer``: SD3, the small model
``official``    the published procedure's pixels          ``tiles``     tiles of the transformer
``flow``        one-step and flow-matching arithmetic     ``vae``       the exact tiled VAE
``colour``      colour fixes                              ``weights``   LoRA files, prompt embeddings, 8-bit weights
``alpha``       transparency                              ``images``, ``video``  files
``image_size``  sizes of results                          ``metrics``, ``train``, ``cli``, ``system``

The names in ``__all__`` are all that most programs need. They load on first use, since diffusers takes seconds.

>>> import torch
>>> from tsdsr_core import load
>>> restorer = load("builtin", device="cpu")
>>> image = torch.rand(1, 3, 24, 32)  # (B, 3, H, W) in 0..1
>>> restorer.restore(image, scale=2, strength=0.8).shape
torch.Size([1, 3, 48, 64])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import InputError
    from .families.bundle import Bundle, read_bundle
    from .families.load import load
    from .families.record import Family
    from .families.restorer import Restorer
    from .images.files import Picture, read_picture, write_picture
    from .pipeline import Model, Options, restore

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "Family",
    "InputError",
    "Model",
    "Options",
    "Picture",
    "Restorer",
    "load",
    "read_bundle",
    "read_picture",
    "restore",
    "write_picture",
]
_MODULES = {
    ".errors": ("InputError",),
    ".families.bundle": ("Bundle", "read_bundle"),
    ".families.load": ("load",),
    ".families.record": ("Family",),
    ".families.restorer": ("Restorer",),
    ".images.files": ("Picture", "read_picture", "write_picture"),
    ".pipeline": ("Model", "Options", "restore"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
