"""Everything that touches ComfyUI's internals.

``schema``          node definitions that older hosts accept too
``files``           model folders, file lists, free output names
``running``         device and free memory, progress, interruption, out-of-memory errors
``sampling``        the one step as a ComfyUI sampler
``models``          native model and VAE objects from bundles
``bundling``        native models back into bundles
``loras``           LoRAs on native models
``layers``          folded and quantised transformers in the host's layers
``vae``             encoding and decoding of any size
``draft``           decoding with TAESD3
``padded_latents``  where the image lies in a padded latent
``previews``        previews of unfinished images
``templates``       their order, and the examples in the input folder that they open
"""
