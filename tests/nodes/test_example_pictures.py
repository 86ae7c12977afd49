"""The example pictures that the templates open: named by them, shipped, copied once and never over a user's file."""

import importlib
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from ..comfyui import host as host_module
from ..comfyui.frontend import WORKFLOWS

ROOT = host_module.ROOT
OPENED = {"LoadImage": "{}", "LoadVideo": "{}", "LoadImageDataSetFromFolder": "{}/lighthouse.png"}


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The module, in a host whose input folder is ``tmp_path / "input"``."""
    host = SimpleNamespace(get_input_directory=lambda: str(tmp_path / "input"))
    monkeypatch.setitem(sys.modules, "folder_paths", host)
    for name, folder in (("pack", ROOT), ("pack.nodes", ROOT / "nodes"), ("pack.nodes.host", ROOT / "nodes" / "host")):
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, name, package)
    yield importlib.import_module("pack.nodes.host.templates")
    for name in [name for name in sys.modules if name.startswith("pack.")]:
        del sys.modules[name]


def test_all_that_the_templates_open_is_copied(examples, tmp_path):
    examples.copy_examples()
    opened = set()
    for path in WORKFLOWS:
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            if node["type"] in OPENED:
                opened.add(OPENED[node["type"]].format(node["widgets_values"][0]))
    copied = {path.relative_to(tmp_path / "input").as_posix() for path in (tmp_path / "input").rglob("*.*")}
    assert opened <= copied == set(examples.EXAMPLES)
    assert {name for name in copied if "/" not in name} <= opened, "no more than is needed lies in a user's folder"
    for name, source in examples.EXAMPLES.items():
        assert (tmp_path / "input" / name).read_bytes() == (ROOT / "docs" / "examples" / source).read_bytes()


def test_a_users_file_of_that_name_stays(examples, tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "tsdsr_lighthouse.png").write_bytes(b"mine")
    examples.copy_examples()
    assert (tmp_path / "input" / "tsdsr_lighthouse.png").read_bytes() == b"mine"
    assert (tmp_path / "input" / "tsdsr_grainy.png").is_file()


def test_a_folder_that_cannot_be_written_to_stops_nothing(examples, tmp_path, caplog):
    (tmp_path / "input").write_bytes(b"a file in the place of the folder")
    with caplog.at_level("INFO"):
        examples.copy_examples()
    assert "tsdsr_lighthouse.png was not copied to the input folder" in caplog.text
    assert (tmp_path / "input").is_file()
