"""The benchmark runs, and its two sides compute the same."""

import json
import sys

import pytest
import torch

from tsdsr_core.bench import SIZES, load_official, load_ours, write_files
from tsdsr_core.cli import main
from tsdsr_core.restore import Options, restore

from .tiny import photo

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The weights of the smallest size, where the command looks for them."""
    work = tmp_path_factory.mktemp("bench")
    (work / "tiny-float32").mkdir()
    write_files(work / "tiny-float32", SIZES["tiny"], torch.float32)
    return work


def test_both_sides_have_the_same_weights(folder):
    """In one tile and with one recipe, the published adapters and the merged, folded bundle give the same picture."""
    image, options = photo(32, 32), Options(scale=4, process_size=0, colour_fix="none")
    official, ours = (load(folder / "tiny-float32", CPU, torch.float32) for load in (load_official, load_ours))
    difference = restore(image, official.model, options) - restore(image, ours.model, options)
    assert difference.abs().max() < 1e-4
    assert restore(image, ours.model, options).std() > 0.01, "the picture is not just grey"
    assert ours.weights < 0.8 * official.weights


def test_it_prints_a_table_and_ends_in_json(folder, capsys):
    arguments = ["bench", "--size", "tiny", "--outputs", "128", "--repeats", "1", "--dtype", "fp32", "--device", "cpu"]
    assert main([*arguments, "--work", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert any("of the published procedure's time" in line for line in lines)
    assert {row["name"] for row in report["rows"]} == {"published", "ours"}
    for row in report["rows"]:
        assert row["seconds"] == pytest.approx(sum(row["stages"].values()), rel=1e-6)
        assert row["flops"] > 1e9
        assert row["peak_bytes"] > 0
    assert report["weights"]["ours"] < report["weights"]["published"]


def test_wrong_sides_are_named(capsys):
    assert main(["bench", "--outputs", "500"]) == 2
    assert "expected sides in multiples of 64" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in ("tsdsr_core.bench", "tsdsr_core.commands.bench"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["bench"]) == 2
    assert "peft is not installed: pip install tsdsr[bench]" in capsys.readouterr().err
