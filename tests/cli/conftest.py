from pathlib import Path

import pytest
import torch

from tsdsr_core.cli.bench.benchmark import SIZES, write_random_weights


@pytest.fixture(scope="session")
def bench_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of the smallest size, where ``tsdsr bench --work`` looks for them; read-only."""
    work = tmp_path_factory.mktemp("bench")
    (work / "tiny-float32").mkdir()
    write_random_weights(work / "tiny-float32", SIZES["tiny"], torch.float32)
    return work
