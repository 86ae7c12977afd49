"""Stable Diffusion 3 through diffusers."""
