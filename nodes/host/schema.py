"""Node definitions, without what an older host does not know, and whether another copy of the pack has defined them."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfy_api.latest import io

log = logging.getLogger("tsdsr")
CATEGORY = "image/upscaling/TSD-SR"
_NEWER = {"accept_all_inputs", "advanced", "essentials_category", "has_intermediate_output", "search_aliases"}
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


def warn_of_another_copy(node: type[io.ComfyNode]) -> None:
    """Say so in the log where a copy of the pack in another folder has defined ``node``: the host keeps the last definition."""
    defined = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    first, second = map(_folder, (defined.get(node.define_schema().node_id), node))
    if first and first != second:  # the same where a tool loads the pack again
        log.warning(
            "TSD-SR is installed twice, in %s and in %s. ComfyUI uses the second: remove one of the two folders, then restart "
            "ComfyUI", first, second,
        )  # fmt: skip


def _folder(node: type | None) -> Path | None:
    """The pack's folder of a class in its folder ``nodes``."""
    file = getattr(sys.modules.get(getattr(node, "__module__", "")), "__file__", None)
    return Path(file).parents[1] if file else None
