"""Finds node ids in source text by the rules of ComfyUI Manager's list, which tells what pack a missing node is in.

No file is run. Every Python file counts, also those of tests; only hidden folders do not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

_MAPPINGS = ("NODE_CLASS_MAPPINGS", "NODE_CONFIG", "NODE_DISPLAY_NAME_MAPPINGS")
_BRACES = (r"_CLASS_MAPPINGS\s*(?::\s*\w+\s*)?=\s*(?:\\\s*)?\{([^}]*)\}", r"_CLASS_MAPPINGS\.update\s*\(\s*\{([^}]*)\}")
_IN_BRACES = (r'"([^"]*)"\s*:', r"'([^']*)'\s*:")
_ANYWHERE = (r"_CLASS_MAPPINGS\[[\"'](.*?)[\"']\]", r'@register_node\("(.+)",\s*".+"\)', r'"(\w+)"\s*:\s*\{"class":\s*\w+')


def node_ids(folder: Path) -> set[str]:
    """The ids that the files of a folder seem to define."""
    files = (path for path in folder.rglob("*.py") if not any(part[0] == "." for part in path.relative_to(folder).parts))
    return {found for path in files for found in ids_in(path.read_text(encoding="utf-8"))}


def ids_in(source: str) -> set[str]:
    """The ids that a file seems to define: those of node classes, and the keys of dictionaries with a certain name."""
    tree = ast.parse(source)
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    found = {_id_of(node) for node in classes if any(_name(base) == "ComfyNode" for base in node.bases)}
    found |= {key for node in ast.walk(tree) if isinstance(node, ast.Assign) for key in _keys(node, tree)}
    for pattern in _BRACES:
        for inside in re.findall(pattern, source):
            found |= {key for each in _IN_BRACES for key in re.findall(each, inside)}
    return found | {key for pattern in _ANYWHERE for key in re.findall(pattern, source)}


def _name(node: ast.expr) -> str | None:
    """The last part of ``a.b.c``."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)


def _text(node: ast.expr | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _id_of(node: ast.ClassDef) -> str:
    """The literal ``node_id`` of the first call of something named Schema in ``define_schema``, else the class's name."""
    methods = (item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "define_schema")
    calls = (call for method in methods for call in ast.walk(method) if isinstance(call, ast.Call))
    ids = (
        _text(each.value) for call in calls if _name(call.func) == "Schema" for each in call.keywords if each.arg == "node_id"
    )
    return next(filter(None, ids), node.name)


def _keys(assignment: ast.Assign, tree: ast.Module) -> Iterator[str]:
    """Keys of an assignment to the dictionaries, or to an entry of theirs."""
    for target in assignment.targets:
        if isinstance(target, ast.Subscript) and _name(target.value) in _MAPPINGS:
            yield from filter(None, [_text(target.slice)])
        if _name(target) not in _MAPPINGS:
            continue
        if isinstance(assignment.value, ast.Dict):
            for key in filter(None, assignment.value.keys):
                owner = key.value if isinstance(key, ast.Attribute) else None
                yield from filter(None, [_text(key), getattr(owner, "id", None)])
        if isinstance(assignment.value, ast.DictComp):  # of classes by their names; their list may be any in the file
            lists = (node for node in ast.walk(tree) if isinstance(node, ast.List))
            listed = {item.id for each in lists for item in each.elts if isinstance(item, ast.Name)}
            yield from listed & {
                each.name for node in ast.walk(tree) for each in (node, *getattr(node, "names", ()))
                if isinstance(each, ast.ClassDef | ast.alias)
            }  # fmt: skip
