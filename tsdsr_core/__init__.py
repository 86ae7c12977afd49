"""One-step super-resolution with TSD-SR (Dong et al., CVPR 2025): the method, without any host application.

``pipeline``    image in, restored image out; start here  ``sd3``      an SD3 folder or a bundle as a ``Model``
``official``    the published procedure's pixels          ``tiles``    tiles of the transformer
``flow``        one-step and flow-matching arithmetic     ``vae``      the exact tiled VAE
``colour``      colour fixes                              ``weights``  LoRA files, bundles, prompt embeddings
``alpha``       transparency                              ``images``, ``video``  files
``image_size``  sizes of results                          ``metrics``, ``train``, ``cli``, ``system``

The names in ``__all__`` are all that most programs need. They load on first use, since diffusers takes seconds.

>>> import torch
>>> from tsdsr_core import Options, load_builtin, restore
>>> model = load_builtin(torch.device("cpu"), torch.float32)
>>> image = torch.rand(1, 3, 24, 32)  # (B, 3, H, W) in 0..1
>>> restore(image, model.restorer(), Options(scale=2, **model.defaults)).shape
torch.Size([1, 3, 48, 64])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import InputError
    from .images.files import Picture, read_picture, write_picture
    from .pipeline import Model, Options, restore
    from .sd3.models import DiffusersModel, load_builtin, load_folder, model_from_bundle
    from .weights.bundle import Bundle, read_bundle

__version__ = "0.1.0"
__all__ = [
    "Bundle",
    "DiffusersModel",
    "InputError",
    "Model",
    "Options",
    "Picture",
    "load_builtin",
    "load_folder",
    "model_from_bundle",
    "read_bundle",
    "read_picture",
    "restore",
    "write_picture",
]
_MODULES = {
    ".errors": ("InputError",),
    ".images.files": ("Picture", "read_picture", "write_picture"),
    ".pipeline": ("Model", "Options", "restore"),
    ".sd3.models": ("DiffusersModel", "load_builtin", "load_folder", "model_from_bundle"),
    ".weights.bundle": ("Bundle", "read_bundle"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
