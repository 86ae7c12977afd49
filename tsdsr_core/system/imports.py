"""Quick imports: a package that can do without others is loaded without them, where they would take seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(*names: str) -> Iterator[None]:
    """Inside, packages called ``names`` are not found, unless they are loaded already.

    What is imported inside keeps doing without them, so this is for programs that know all that they will need.

    >>> with hidden("colorsys"):
    ...     try:
    ...         import colorsys
    ...     except ModuleNotFoundError:
    ...         print("not found")
    not found
    >>> import colorsys
    """
    new = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(new))  # type: ignore[arg-type]  # Python's way to say that there is no such module
    try:
        yield
    finally:
        for name in new:
            if sys.modules[name] is None:
                del sys.modules[name]
