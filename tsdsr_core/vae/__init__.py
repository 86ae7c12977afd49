"""The tiled autoencoder, equal to the untiled one up to rounding.

``program``     a VAE as a flat list of operations
``plan``        which region of its input each operation takes for each tile, in whole numbers
``execute``     runs a program by a plan
``tile_loop``   goes over the tiles of a pass, with smaller ones after memory ran out
``attention``   the middle block's attention over tiles
``statistics``  statistics of group norms, merged over tiles
``norms``       the norms themselves, as each kind of device runs them best; ``triton_norms`` as kernels of Triton's
``transfer``    moves tiles between device and host memory
``forms``       shapes and bytes of maps
"""
