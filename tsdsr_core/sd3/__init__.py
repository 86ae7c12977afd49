"""Stable Diffusion 3 through diffusers: loading, running and folding; the only inference code that imports diffusers."""
