import shutil
import sys
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest
import torch

from tsdsr_core.cli import main

from .comfyui import frontend
from .comfyui import host as host_module
from .comfyui.graphs import SD3, make_sd3
from .comfyui.host import Graph, Host
from .support.perceptual_files import Packages, make_packages
from .support.tiny import Published, make_published, photo

TESTS = Path(__file__).parent

hypothesis.settings.register_profile("suite", deadline=None)  # how fast the machine is says nothing of the code
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this system does not have; the slowest folders first, so that the processes of ``pytest -n`` end together."""
    items.sort(key=lambda item: not any(TESTS / folder in item.path.parents for folder in ("nodes", "train")))
    for item in items:
        if item.get_closest_marker("posix") and sys.platform == "win32":
            item.add_marker(pytest.mark.skip(reason="Windows has no pipes, signals, file size limits or such file names"))
        if item.get_closest_marker("linux") and sys.platform != "linux":
            item.add_marker(pytest.mark.skip(reason="only on Linux is a file name any bytes"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With ``pytest -n``, reports are sent as UTF-8, in which names of files in logs may not fit."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Each test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Tiny random models in the published layouts; read-only."""
    return make_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Random weights in archives of the layouts that perceptual weights come from; read-only."""
    return make_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def perceptual_weights(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that ``tsdsr perceptual-weights`` makes of them; read-only."""
    path = tmp_path_factory.mktemp("perceptual") / "perceptual.safetensors"
    assert main(["perceptual-weights", "--lpips", str(packages.lpips), "--dists", str(packages.dists), "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory):
    """A running ComfyUI with a few pictures; the test is skipped where none is installed."""
    from tsdsr_core.images.files import Picture, write_picture

    found = host_module.find()
    if found is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH, and COMFYUI_PYTHON where it has no .venv")
    server = Host(*found, tmp_path_factory.mktemp("host"))
    small = {
        "tsdsr_lighthouse": (16, 20),
        "tsdsr_grainy": (20, 16),
        "tsdsr_photos/lighthouse": (16, 20),
        "tsdsr_photos/parrots": (21, 17),
    }
    for name, size in small.items():  # in place of the examples
        write_picture(server.base / "input" / f"{name}.png", Picture(photo(*size)))
    (server.base / "input" / "tsdsr_photos" / "window.png").unlink()
    shutil.copy(host_module.ROOT / "tests" / "data" / "lq-light" / "lighthouse.png", server.base / "input" / "lighthouse.png")
    write_picture(server.base / "input" / "photo.png", Picture(photo(44, 52, 3)))
    write_picture(server.base / "input" / "large.png", Picture(photo(512, 512, 4)))
    write_picture(server.base / "input" / "alpha.png", Picture(photo(20, 26), alpha=photo(20, 26, 9)[:, :1]))
    yield server
    server.close()


@pytest.fixture
def default_dtype(host: Host):
    """A function that sets torch's default number type in the host, by its name, until the end of a test."""

    def set_default(dtype: str) -> None:
        graph = Graph()
        graph.add("TestDefaultDtype", dtype=dtype)
        assert host.run(graph).status == "success"
        host.post("/free", {"free_memory": True, "unload_models": True})  # so that loaders run again

    yield set_default
    set_default("float32")


@pytest.fixture(scope="session")
def sd3(host: Host) -> SD3:
    """Random weights in SD3's layout, where the host finds them."""
    return make_sd3(host)


@pytest.fixture(scope="session")
def browser():
    """A Chromium; the test is skipped where there is none, or no package of the frontend."""
    if frontend.SKIPPED:
        pytest.skip(frontend.SKIPPED)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=frontend.CHROMIUM, args=frontend.ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=frontend.PAGES)
def page(request: pytest.FixtureRequest, browser):
    """The frontend, ready, as ``frontend.open_page`` gives it."""
    address, newest = None, request.param.endswith(frontend.WITH_NEWEST)
    if newest and not frontend.NEWEST:
        pytest.skip("no newer frontend: set NEWEST_FRONTEND_PATH")
    if request.param.startswith("host"):
        server = request.getfixturevalue("host")
        server.post("/settings", frontend.SETTINGS)
        address = f"http://127.0.0.1:{server.port}/"
    page = frontend.open_page(browser, address, newest)
    yield page
    page.close()
