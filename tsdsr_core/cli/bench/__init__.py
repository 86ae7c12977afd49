"""Measure time and memory against the published procedure, with random weights in the published layout."""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
