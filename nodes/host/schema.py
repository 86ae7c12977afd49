"""Node definitions, without what an older host does not know."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

CATEGORY = "image/upscaling/TSD-SR"
_NEWER = {"accept_all_inputs", "advanced", "essentials_category", "search_aliases"}
"""Options that came after the oldest host; a node works without them."""


class Schema(io.Schema):
    """An ``io.Schema`` in the pack's category.

    Directories of nodes read the source, where they look for a call of this name whose ``node_id`` is a literal.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(category=CATEGORY, **_known(io.Schema, options))


def field(kind: Any, name: str, **options: Any) -> Any:
    """An input of ``kind``, such as ``io.Float``."""
    return kind.Input(name, **_known(kind.Input, options))


def _known(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options but for newer ones that this host lacks; a misspelt one stays and is refused."""
    missing = _NEWER - inspect.signature(function).parameters.keys()
    return {name: value for name, value in options.items() if name not in missing}
