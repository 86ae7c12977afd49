import shutil

import pytest

from . import host as host_module
from .host import Host
from .host_graphs import SD3, make_sd3
from .tiny import Published, make_published, photo


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Tiny random models in the published layouts; read-only."""
    return make_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory):
    """A running ComfyUI with a few pictures; the test is skipped where none is installed."""
    from tsdsr_core.image_io import Picture, write_picture

    found = host_module.find()
    if found is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH, and COMFYUI_PYTHON where it has no .venv")
    server = Host(*found, tmp_path_factory.mktemp("host"))
    for name in ("example", "photos/a"):
        write_picture(server.base / "input" / f"{name}.png", Picture(photo(16, 20)))
    write_picture(server.base / "input" / "photos" / "b.png", Picture(photo(21, 17)))
    shutil.copy(host_module.ROOT / "tests" / "data" / "lq-light" / "lighthouse.png", server.base / "input" / "lighthouse.png")
    write_picture(server.base / "input" / "photo.png", Picture(photo(44, 52, 3)))
    write_picture(server.base / "input" / "large.png", Picture(photo(512, 512, 4)))
    write_picture(server.base / "input" / "alpha.png", Picture(photo(20, 26), alpha=photo(20, 26, 9)[:, :1]))
    yield server
    server.close()


@pytest.fixture(scope="session")
def sd3(host: Host) -> SD3:
    """Random weights in SD3's layout, where the host finds them."""
    return make_sd3(host)
