"""Two copies of the pack in one host, as after an update by hand."""

import re
from pathlib import Path

import pytest

from ...comfyui import host as host_module
from ...comfyui.host import Host

COPIES = (host_module.PACK, "tsdsr")
"""As people clone it, and as the registry names it."""


@pytest.fixture
def twice(tmp_path):
    found = host_module.find()
    if found is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH, and COMFYUI_PYTHON where it has no .venv")
    server = Host(*found, tmp_path, COPIES)
    yield server
    server.close()


def test_two_copies_are_named_once_in_the_log(twice):
    log = twice.log.read_text()
    assert log.count("TSD-SR is installed twice") == 1
    first, second = (Path(folder) for folder in re.search(r"twice, in (\S+) and in (\S+)\. ComfyUI", log).groups())
    assert {first, second} == {twice.base / "custom_nodes" / name for name in COPIES}
    assert twice.get("/object_info/TSDSRUpscale")["TSDSRUpscale"]["python_module"] == f"custom_nodes.{second.name}"
