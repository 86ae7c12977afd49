"""The one home of ComfyUI's mechanics.

``schema``   node definitions that older hosts accept too     ``files``     model folders and file lists
``running``  progress, interruption, errors                   ``sampling``  the one step as a ComfyUI sampler
``models``   native model and VAE objects                     ``vae``       encoding and decoding of any size
``folded``   folded transformers in the host's own            ``eight_bit`` 8-bit weights in the host's quantised layers
``placement`` where the image lies in a padded latent
"""
