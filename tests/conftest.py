import pytest

from .tiny import Published, make_published


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Tiny random models in the published layouts; read-only."""
    return make_published(tmp_path_factory.mktemp("published"))
