"""Node definitions, without what an older host does not know."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

CATEGORY = "image/upscaling/TSD-SR"


def schema(node_id: str, display_name: str, **fields: Any) -> io.Schema:
    """An ``io.Schema`` in the pack's category."""
    return _call(io.Schema, node_id=node_id, display_name=display_name, category=CATEGORY, **fields)


def field(kind: Any, name: str, **options: Any) -> Any:
    """An input of ``kind``, such as ``io.Float``."""
    return _call(kind.Input, name, **options)


def _call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    known = inspect.signature(function).parameters
    return function(*args, **{name: value for name, value in options.items() if name in known})
