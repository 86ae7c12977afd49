"""Checks of single values, shared by the library, the command line and the nodes."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any, TypeGuard

from .errors import InputError

_SHOWN = 8
_LENGTH = 150
"""Maximum number of names in a message, and of their characters together; one name is always shown."""
_LARGEST = 1e30
"""Limit of the magnitude of numbers in files; fp32 ends at 3e38."""


def check_number(name: str, value: Any, low: float, high: float = math.inf, whole: bool = False) -> Any:
    """Return ``value`` if it is a number from ``low`` to ``high``.

    Args:
        name: of the setting, for the message.
        whole: whether it must be an integer.

    Raises:
        InputError: for anything else, such as NaN, text, booleans or None.

    >>> check_number("scale", 2.5, 1, 16)
    2.5
    >>> check_number("scale", 40, 1, 16)
    Traceback (most recent call last):
    tsdsr_core.errors.InputError: scale 40: expected a number from 1 to 16
    """
    if not _is_number(value, whole) or not low <= value <= high:  # NaN is in no range
        limits = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise InputError(f"{name} {described(value)}: expected a {'whole ' if whole else ''}number {limits}")
    return value


def _is_number(value: Any, whole: bool) -> bool:
    return isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        InputError: if it is not.
    """
    known = list(choices)
    if not any(type(value) is type(choice) and value == choice for choice in known):
        raise InputError(f"{name} {described(value)}: expected one of {some(known)}")
    return value


def is_bounded(value: Any) -> TypeGuard[float]:
    """Whether a value from a file is an int or float, finite and of magnitude below 1e30."""
    return type(value) in (int, float) and -_LARGEST < value < _LARGEST


def some(names: Iterable[Any]) -> str:
    """The first names of a list, in at most about a line, and how many more there are.

    >>> some("abcdefghij")
    'a, b, c, d, e, f, g, h and 2 more'
    """
    found = [str(name) for name in names]
    shown = found[:_SHOWN]
    while len(shown) > 1 and len(", ".join(shown)) > _LENGTH:
        shown.pop()
    more = f" and {len(found) - len(shown)} more" if len(found) > len(shown) else ""
    return ", ".join(shown) + more


def described(value: Any) -> str:
    """A short description of any value, for a message."""
    if isinstance(value, str | bool | int | float | type(None)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    nested = getattr(value, "is_nested", False)  # torch's cannot tell their shape
    shape = f" of shape {tuple(value.shape)}" if not nested and hasattr(value, "shape") else ""
    return f"({type(value).__name__}{shape})"
