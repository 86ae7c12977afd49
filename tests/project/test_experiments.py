"""The experiment of docs/experiments, in miniature: what the paper says of its objectives holds with this project's losses."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parents[2] / "docs" / "experiments"


@pytest.fixture(scope="module")
def digits():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        yield importlib.import_module("digits")
    for name in ("digits", "drawn_digits"):
        del sys.modules[name]


def test_tsd_improves_where_vsd_runs_away(digits, tmp_path, monkeypatch):
    """While phi lags.  Measured: start 217, VSD 2182, TSD of velocities 2798, TSD 137, TSD + DASM 129."""
    arms = ("VSD", "TSD, velocities", "TSD", "TSD + DASM")
    monkeypatch.setattr(digits, "ARMS", {name: digits.ARMS[name] for name in arms})
    found, picture = digits.experiment(digits.MINIATURE, 1, tmp_path, more=False)
    start = found["where the student starts"][0]
    assert found["TSD"][0] < 0.85 * start
    assert found["TSD + DASM"][0] < 0.85 * start
    assert found["VSD"][0] > 2 * start
    assert found["TSD, velocities"][0] > 2 * start
    assert picture.shape == (1, 28 * 7, 28 * 20)


def test_the_frechet_distance_of_gaussians(digits):
    """``|m|^2 + tr(C + C' - 2 (C C')^(1/2))`` by hand, for diagonal covariances."""
    features = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0))
    other = features * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([3.0, 0.0, 0.0])
    assert digits.frechet(features, features) == pytest.approx(0, abs=1e-6)
    assert digits.frechet(features, other) == pytest.approx(9 + 1 + 0 + 0.25, rel=0.05)
