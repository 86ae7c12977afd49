"""Tiles of latents for the transformer: their positions (``plan``), blending (``blend``) and number at once (``memory``)."""
