"""Tiles of the transformer."""
