"""What the Comfy registry, ComfyUI Manager and comfy-cli read of the pack without running it."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import pytest

import tsdsr_core

from ..comfyui.stub_host import schemas
from ..support.node_scanner import ids_in, node_ids
from ..support.published import ROOT, left_out, published_files

MAPPINGS = "NODE_" + "CLASS_MAPPINGS"  # in parts, since this file is scanned too


def test_the_version_is_where_the_manager_reads_it():
    """It knows an installed pack by name and version under [project]; without either it does not list, update or remove it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert re.fullmatch(r"[a-z0-9-]+", project["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["version"] == tsdsr_core.__version__
    assert "dynamic" not in project


def lists_in(value: Any) -> Iterator[list]:
    """All lists in a document, also those in others."""
    if isinstance(value, list):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from lists_in(each)


def test_the_manager_can_read_the_project_file():
    """Its parser refuses a list of mixed types, such as a dependency group that includes another, and a byte order mark."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not text.startswith("\ufeff")
    assert all(len({type(item) for item in each}) <= 1 for each in lists_in(tomllib.loads(text)))
    assert not all(len({type(item) for item in each}) <= 1 for each in lists_in(tomllib.loads('a = {b = [["x", {c = 1}]]}')))


def test_a_scanner_of_the_source_finds_the_nodes_and_nothing_else(monkeypatch):
    assert node_ids(ROOT) == schemas(monkeypatch).keys()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('class A(io.ComfyNode):\n def define_schema(cls): return io.Schema(node_id="B", category="C")', {"B"}),
        ('class A(ComfyNode):\n def define_schema(cls): return Schema(display_name="C", node_id="B")', {"B"}),
        ('class A(io.ComfyNode):\n def define_schema(cls): return schema("B")', {"A"}),
        ("class A(io.ComfyNode):\n def define_schema(cls): return io.Schema(node_id=NAME)", {"A"}),
        ("class A(Base):\n pass", set()),
        ('MAP = {"B": A, C.NAME: C, **others}', {"B", "C"}),
        ('MAP["B"] = A', {"B"}),
        ("MAP.update({'B': A})", {"B"}),
        ("from a import A\nclass B: pass\nnodes = [A, B, c]\nMAP = {node.__name__: node for node in nodes}", {"A", "B"}),
        ('nodes = (A, B)\nMAP = {f"Test{node.__name__}": node for node in nodes}', set()),
    ],
)
def test_the_scanner_has_the_rules_of_the_manager(source, found):
    assert ids_in(source.replace("MAP", MAPPINGS)) == found


def test_the_published_pack_holds_what_a_host_needs():
    files = published_files()
    needed = ["__init__.py", "nodes", "tsdsr_core/pipeline.py", "tsdsr_core/assets", "web", "locales", "workflows", "subgraphs",
              "docs/examples", "docs/commands.md", "constraints.txt", "pyproject.toml", "requirements.txt", "LICENSE",
              "README.md"]  # fmt: skip
    for name in map(PurePosixPath, needed):
        inside = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / name).rglob("*")) if path.is_file()]
        wanted = {PurePosixPath(path) for path in inside if "__pycache__" not in path} or {name}
        assert wanted <= set(files), name
    assert not any(path.parts[0] in ("tests", "findings", ".ci", ".github") or "train" in path.parts for path in files)


def test_what_only_developers_need_is_named_from_the_top():
    """A name without / in front would match in any folder."""
    assert all(line.startswith("/") for line in (ROOT / ".comfyignore").read_text().split())


@pytest.mark.parametrize(
    ("pattern", "out"),
    [
        ("/docs/", {"docs/a.py", "docs/b/a.py"}),
        ("/docs/*.py", {"docs/a.py"}),
        ("docs/", {"docs/a.py", "docs/b/a.py", "x/docs/a.md"}),
        ("/a.py", {"a.py"}),
        ("*.py", {"a.py", "docs/a.py", "docs/b/a.py"}),
        ("/a.py/", set()),
    ],
)
def test_patterns_match_as_those_of_git(pattern, out):
    files = ["a.py", "docs/a.py", "docs/b/a.py", "x/docs/a.md"]
    assert {path for path in files if left_out(PurePosixPath(path), [pattern])} == out


def test_no_tool_installs_packages_for_the_nodes(tmp_path):
    """Tools take the first of requirements.txt and pyproject.toml; pip must accept a file without a requirement."""
    pytest.importorskip("pip")
    path = ROOT / "requirements.txt"
    assert all(line.startswith("#") for line in path.read_text(encoding="utf-8").splitlines())
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--target", tmp_path / "out", "--requirement", path]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert not list(tmp_path.glob("out/*"))


@pytest.fixture
def published(tmp_path):
    """The pack as it is unpacked at a user's."""
    for path in published_files():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


def test_links_lead_somewhere_in_the_published_pack(published, monkeypatch):
    from ..project import test_docs

    monkeypatch.setattr(test_docs, "ROOT", published)
    pages = sorted(published.rglob("*.md"))
    assert published / "README.md" in pages
    assert {page.relative_to(published).as_posix(): found for page in pages if (found := test_docs.broken(page))} == {}
