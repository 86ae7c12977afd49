"""Faster imports: loads a package without its optional dependencies, which may take seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Inside, packages called ``names`` are not found, unless they are loaded already.

    What is imported inside works without them later too, so this is for programs that know all that they will need.

    >>> with hidden("wave"):
    ...     try:
    ...         import wave
    ...     except ModuleNotFoundError:
    ...         print("not found")
    not found
    >>> import wave
    """
    new = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(new))  # type: ignore[arg-type]  # None means that there is no such module
    try:
        yield
    finally:
        for name in new:
            if sys.modules[name] is None:
                del sys.modules[name]
