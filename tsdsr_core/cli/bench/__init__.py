"""measure time and memory against the published procedure, on random weights in the published layout"""

from .command import add_arguments, run

__all__ = ["add_arguments", "run"]
