"""The benchmark runs, and its two sides compute the same."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tsdsr_core.cli import arguments, main
from tsdsr_core.cli.bench import command
from tsdsr_core.cli.bench.benchmark import (
    Contender,
    count_flops,
    load_ours,
    load_published,
    synchronise,
)
from tsdsr_core.pipeline import Model, Options, restore

from ..support.tiny import photo

CPU = torch.device("cpu")


@pytest.mark.rounding
def test_both_sides_have_the_same_weights(bench_folder):
    """In one tile and with one recipe, the published adapters and the merged, folded bundle give the same picture."""
    image, options = photo(32, 32), Options(scale=4, process_size=0, colour_fix="none")
    official, ours = (load(bench_folder / "tiny-float32", CPU, torch.float32) for load in (load_published, load_ours))
    difference = restore(image, official.model, options) - restore(image, ours.model, options)
    assert difference.abs().max() < 1e-4
    assert restore(image, ours.model, options).std() > 0.01, "the picture is not just grey"
    assert ours.weights < 0.8 * official.weights


def test_attention_is_counted():
    """On the CPU too, where torch has no formula for it: two products of 2 operations for each head, query, key and channel."""

    def attention(z):
        query = z.reshape(1, 3, 32, 8)
        key = query[:, :, :20]
        return F.scaled_dot_product_attention(query, key, key).reshape(z.shape)

    model = Model(lambda x: F.avg_pool2d(x, 8), attention, lambda z: F.interpolate(z, scale_factor=8.0), scaling_factor=1.0)
    contender = Contender("attention", model, Options(scale=4, process_size=0, colour_fix="none"), 0, 0.0)
    assert count_flops(contender, 128, CPU) == 2 * 2 * 3 * 32 * 20 * 8


def test_it_prints_a_table_and_ends_in_json(bench_folder, capsys):
    arguments = ["bench", "--size", "tiny", "--outputs", "128", "--repeats", "1", "--dtype", "fp32", "--device", "cpu"]
    assert main([*arguments, "--work", str(bench_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert any("times the published procedure's time" in line for line in lines)
    assert {row["name"] for row in report["rows"]} == {"published", "ours"}
    for row in report["rows"]:
        assert row["seconds"] == pytest.approx(sum(row["stages"].values()), rel=1e-6)
        assert row["flops"] > 1e9
        assert row["peak_bytes"] >= 0, "little or nothing once it is warm"
    assert report["weights"]["ours"] < report["weights"]["published"]


def report_of(folder, capsys, *arguments: str) -> dict:
    given = ["bench", "--outputs", "128", "--repeats", "1", "--dtype", "fp32", "--device", "cpu", "--work", str(folder)]
    assert main([*given, *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_what_is_compiled_is_compiled_before_it_is_timed_and_not_under_a_counter(bench_folder, capsys, monkeypatch):
    """torch.compile gives up for good what it first meets under a dispatch mode, such as the counter of operations."""
    modes = []

    def compiled(model):
        return lambda **given: modes.append(is_in_torch_dispatch_mode()) or model(**given)

    monkeypatch.setattr(torch, "compile", compiled)
    rows = report_of(bench_folder, capsys, "--only", "ours", "--compile")["rows"]
    assert modes == [False] * len(modes)
    assert len(modes) == 2, "one run that is not timed, and one that is; one batch of tiles each"
    assert rows[0]["flops"] > 1e9


@pytest.mark.parametrize("error", [MemoryError("the VAE needs 90 GB"), torch.OutOfMemoryError("CUDA out of memory")])
def test_what_does_not_fit_is_a_row_too(bench_folder, capsys, monkeypatch, error):
    run_once = command.run_once

    def short(contender, side, device):
        if contender.name == "published":
            raise error
        return run_once(contender, side, device)

    monkeypatch.setattr(command, "run_once", short)
    published, ours = report_of(bench_folder, capsys)["rows"]
    assert published == {"side": 128, "name": "published", "error": str(error)}
    assert ours["seconds"] > 0


def test_other_errors_end_it(bench_folder, monkeypatch):
    def fault(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(command, "run_once", fault)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["bench", "--outputs", "128", "--only", "ours", "--dtype", "fp32", "--device", "cpu", "--work", str(bench_folder)])


def test_the_chosen_device_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    synchronise(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]


def test_the_published_weights_do_not_count_to_our_memory(bench_folder, capsys, monkeypatch):
    """Of 8 GB on a device the published side's weights are 7."""
    monkeypatch.setattr(command, "memory_limit", lambda options, device: int(options.memory * 1e9))
    monkeypatch.setattr(command, "held_memory", lambda device: 7 * 10**9)
    monkeypatch.setattr(arguments, "held_memory", lambda device: 8 * 10**9)
    assert report_of(bench_folder, capsys, "--memory", "1.1")["rows"][1]["seconds"] > 0
    assert main(["bench", "--dtype", "fp32", "--device", "cpu", "--work", str(bench_folder), "--memory", "1"]) == 2
    assert "--memory 1: the weights alone take 1.0 GB" in capsys.readouterr().err


def test_wrong_sides_and_a_limit_without_a_gpu_are_named(capsys):
    assert main(["bench", "--outputs", "500"]) == 2
    assert "expected sides that are multiples of 64" in capsys.readouterr().err
    assert main(["bench", "--memory", "4", "--device", "cpu"]) == 2
    assert "--memory 4 applies to GPUs only" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in ("tsdsr_core.cli.bench.benchmark", "tsdsr_core.cli.bench.command"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["bench"]) == 2
    assert "peft is not installed: pip install -e '.[bench]'" in capsys.readouterr().err
