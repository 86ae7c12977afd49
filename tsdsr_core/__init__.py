"""One-step super-resolution with TSD-SR (Dong et al., CVPR 2025): the method, without any host application.

``restore``   the pipeline over callables              ``tile_plan``, ``tile_blend``  latent tiles
``flow``      one-step and flow-matching arithmetic    ``colour``    colour fixes
``lora``      read, check and merge LoRA files         ``prompt``    prompt embeddings
``bundle``    one file with everything a model needs   ``memory``    batch sizes from free memory
``diffusers_models``  an SD3 folder or a bundle as callables          ``image_io``, ``cli``  files and the command line
"""

__version__ = "0.1.0"
