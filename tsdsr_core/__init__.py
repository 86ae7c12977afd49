"""One-step super-resolution with TSD-SR (Dong et al., CVPR 2025): the method, without any host application.

``restore``     the pipeline; start here                  ``sd3``      an SD3 folder or a bundle as a ``restore.Model``
``official``    the published procedure's pixels          ``tiles``    tiles of the transformer
``flow``        one-step and flow-matching arithmetic     ``vae``      the exact tiled VAE
``colour``      colour fixes                              ``weights``  LoRA files, bundles, prompt embeddings
``alpha``       transparency                              ``images``, ``video``  files
``image_size``  sizes of results                          ``metrics``, ``train``, ``cli``, ``system``

>>> import torch
>>> from tsdsr_core.restore import Options, restore
>>> from tsdsr_core.sd3.models import load_builtin
>>> model = load_builtin(torch.device("cpu"), torch.float32)
>>> image = torch.rand(1, 3, 24, 32)  # (B, 3, H, W) in 0..1
>>> restore(image, model.restorer(), Options(scale=2, **model.defaults)).shape
torch.Size([1, 3, 48, 64])
"""

__version__ = "0.1.0"
