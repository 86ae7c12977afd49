"""The tiled autoencoder, equal to the untiled one up to rounding.

``program``      a VAE as a flat list of passes
``passes``       a pass as numbers: channels, halo, memory of a tile
``plan``         tile sizes, the input region of each tile with its halo, and where the maps are
``execute``      runs a program with a plan
``feature_map``  full activations between passes, and what all passes over an image share
``convolution``  a convolution over tiles, with its norm and residual
``attention``    the middle block's attention over tiles
``tile_loop``    goes over the tiles of a pass, with smaller ones after an out-of-memory error
``statistics``   statistics of group norms, merged over tiles
``norms``        the norms themselves, as each kind of device runs them best; ``triton_norms`` as kernels of Triton's
``transfer``     moves tiles between device and host memory
"""
