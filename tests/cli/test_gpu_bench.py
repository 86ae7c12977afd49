"""``tsdsr bench --gpu``, small and on the CPU: its tables, its JSON, and what it leaves out."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tsdsr_core.cli import main
from tsdsr_core.cli.bench import comfyui
from tsdsr_core.cli.bench import gpu as command
from tsdsr_core.cli.bench import gpu_parts as parts
from tsdsr_core.cli.bench.benchmark import SIZES, load_ours
from tsdsr_core.cli.bench.gpu_report import markdown
from tsdsr_core.vae import attention

from ..comfyui import host

CPU = torch.device("cpu")
HEAD = {
    "machine": "card", "size": "tiny", "dtype": "torch.float16", "repeats": 3, "weights": {}, "load_seconds": {},
    "ceiling_flops": 1e12,
}  # fmt: skip
"""Of a report."""
GIVEN = ["bench", "--gpu", "--size", "tiny", "--outputs", "128", "64", "--repeats", "1", "--device", "cpu"]


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Rows of the Markdown tables by the bold title above them."""
    found, title, head = {}, "", []
    for line in text.splitlines():
        if line.startswith("**"):
            title, head = line.strip("*"), []
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not head:
                head = cells
            elif set(line) != {"|", "-"}:
                assert len(cells) == len(head), line
                found.setdefault(title, []).append(dict(zip(head, cells, strict=True)))
        else:
            head = []
    return found


def test_one_run_gives_every_part_as_json_and_as_tables(bench_folder, capsys):
    assert main([*GIVEN, "--work", str(bench_folder)]) == 0
    text, _, last = capsys.readouterr().out.strip().rpartition("\n")
    report, shown = json.loads(last), tables(text)
    assert [(row["side"], row["name"]) for row in report["rows"]] == [
        (64, "published"), (64, "ours"), (128, "published"), (128, "ours"),
    ]  # fmt: skip
    times = shown["Against the published procedure"]
    for row, cells in zip(report["rows"], times, strict=True):
        assert float(cells["seconds"]) == pytest.approx(row["seconds"], rel=0.05, abs=1e-3)
        assert float(cells["colour"]) == pytest.approx(row["stages"]["colour"], rel=0.05, abs=1e-3)
    assert (
        len(report["exactness"]) == len(shown["The autoencoder against fp64 without tiles, relative to the largest value"]) == 2
    )
    for row in report["exactness"]:
        assert 0 < row["tiled"] < 1e-4, "rounding of fp32"
        assert 0 < row["untiled"] < 1e-4
    assert report["difference"]["maximum"] < 0.1, "the same weights"
    assert [row["tokens"] for row in report["attention"]] == [64, 64, 256, 256]
    assert all("needs a GPU" in row["skipped"] for row in report["held"])
    assert len(shown["Ours on smaller cards: the rest of the memory is filled"]) == len(report["held"]) == 8
    for name in ("step", "decode"):
        profile = report["profiles"][name]
        assert 0 < sum(kernel["milliseconds"] for kernel in profile["kernels"]) <= profile["milliseconds"]
    assert any("conv" in kernel["name"] for kernel in report["profiles"]["decode"]["kernels"])
    assert "error" not in last


def test_a_wrong_tile_would_show(monkeypatch):
    """The exactness is that of what runs: a VAE that forgets a pass is found."""
    run = parts.plan_and_run
    monkeypatch.setattr(parts, "plan_and_run", lambda program, *rest: run(program, *rest) * 1.01)
    rows = parts.exactness(SIZES["tiny"].vae, 64, CPU, torch.float32)
    assert all(row["tiled"] > 5e-3 > 1e-4 > row["untiled"] for row in rows)


def test_what_no_time_is_left_for_is_named(bench_folder, capsys):
    assert main([*GIVEN, "--work", str(bench_folder), "--minutes", "1e-9"]) == 0
    text, _, last = capsys.readouterr().out.strip().rpartition("\n")
    report = json.loads(last)
    for name in ("exactness", "attention", "difference", "rows", "profiles", "held"):
        assert report[name] == {"skipped": command.NO_TIME}
    assert text.count("Not measured: no time was left.") == 6


def test_sides_run_once_or_not_at_all_where_time_is_short(monkeypatch):
    """A round of 512 takes 10 s, so one of 1024 is expected to take 60 s, and of 2048 from there 360 s."""
    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])

    def compare(trials, rounds, compiled):
        now[0] += (rounds + 1) * {512: 10, 1024: 60}[trials[0].side]
        return [{"side": trials[0].side, "rounds": rounds}]

    monkeypatch.setattr(command, "compare", compare)
    contender: Any = None  # of which the stand-in asks nothing
    clock = command.Clock(300)  # of which 75 are kept for the other parts
    rows = command._rows([contender], [512, 1024, 2048], 3, CPU, clock)
    assert rows == [
        {"side": 512, "rounds": 3}, {"side": 1024, "rounds": 1},
        {"side": 2048, "name": "both", "skipped": command.NO_TIME},
    ]  # fmt: skip


def test_a_part_that_fails_costs_itself_alone(bench_folder, capsys, monkeypatch):
    def fault(*_):
        raise RuntimeError("the profiler has no rights")

    monkeypatch.setattr(parts, "profiles", fault)
    assert main([*GIVEN, "--work", str(bench_folder), "--only", "ours"]) == 0
    text, _, last = capsys.readouterr().out.strip().rpartition("\n")
    report = json.loads(last)
    assert report["profiles"] == {"error": "the profiler has no rights"}
    assert "Not measured: the profiler has no rights." in text
    assert len(report["rows"]) == 2
    assert "difference" not in report, "there is nothing to compare with"


def test_attention_that_does_not_fit_is_a_row_too(monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "fused", short)
    rows = parts.attention_rows([64], CPU, torch.float32)
    assert rows[0] == {"side": 64, "tokens": 64, "way": "torch's kernel", "error": "CUDA out of memory"}
    assert rows[1]["seconds"] > 0


def test_a_smaller_card_is_this_one_filled(bench_folder, monkeypatch):
    """Of 8.1 GB, 0.1 of them taken, a card of 8 GB leaves 0.1 to be filled, and none is left of a card of 12 GB."""
    ours = load_ours(bench_folder / "tiny-float32", CPU, torch.float32)
    device, filled, empty = torch.device("meta"), [], torch.empty
    monkeypatch.setattr(parts, "free_memory", lambda device: int(8.0e9))
    monkeypatch.setattr(parts, "held_memory", lambda device: int(0.1e9))
    monkeypatch.setattr(parts, "release_memory", lambda device: None)
    monkeypatch.setattr(parts, "Trial", FakeTrial)
    monkeypatch.setattr(parts.torch, "empty", lambda size, **given: filled.append(size) or empty(size, **given))
    row = parts.held(ours, 64, 8, device)
    assert row == {"gigabytes": 8, "side": 64, "name": "ours", "error": "does not fit"}
    assert filled == [int(0.1e9)]
    assert "needs a GPU with more memory" in parts.held(ours, 64, 12, device)["skipped"]


class FakeTrial:
    def __init__(self, contender, side, device):
        self.contender, self.side = contender, side

    def time(self):
        pass

    def row(self):
        return {"side": self.side, "name": self.contender.name, "error": "does not fit"}


def test_rows_that_failed_say_so_in_the_table():
    rows = [{"side": 4096, "name": "published", "error": "CUDA out of memory"}]
    text = markdown({**HEAD, "rows": rows})
    (cells,) = tables(text)["Against the published procedure"]
    assert cells["seconds"] == "does not fit: CUDA out of memory"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--size", "sd3-medium"], "--size tiny it runs small on the CPU"),
        (["--memory", "8"], "--memory and --compile do not go with --gpu"),
        (["--compile"], "--memory and --compile do not go with --gpu"),
        (["--minutes", "0"], "--minutes 0: expected a number above 0"),
        (["--minutes", "nan"], "--minutes nan: expected a number above 0"),
        (["--comfyui", "tests"], "--comfyui tests: expected the folder of a ComfyUI, with main.py in it"),
    ],
)
def test_what_does_not_go_together_is_named(given, said, capsys):
    assert main([*GIVEN, *given]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def stub(tmp_path) -> Path:
    """The folder of a ComfyUI that does not start, and has no dynamic VRAM."""
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "cli_args.py").write_text("--novram")
    (tmp_path / "main.py").write_text("raise SystemExit('no module named torch')")
    return tmp_path


def test_a_comfyui_needs_weights_that_stay(stub, bench_folder, capsys):
    assert main([*GIVEN, "--comfyui", str(stub)]) == 2
    assert "--comfyui needs --work FOLDER" in capsys.readouterr().err
    assert main(["bench", "--comfyui", str(stub), "--work", str(bench_folder)]) == 2
    assert "--comfyui goes with --gpu" in capsys.readouterr().err


def test_a_comfyui_that_does_not_start_costs_itself_alone(stub, bench_folder):
    rows = comfyui.rows_in_comfyui(stub, bench_folder, [64], 128, torch.device("cuda"), time.monotonic() + 60)
    assert [(row["mode"], row["side"]) for row in rows] == [
        ("default", 64), ("no dynamic VRAM", 64), ("no VRAM", 64), (comfyui.TAESD, 128)
    ]  # fmt: skip
    assert rows[1]["skipped"] == "this ComfyUI has no --disable-dynamic-vram"
    assert rows[3]["skipped"] == "this ComfyUI has no --preview-method taesd"
    assert rows[0]["error"] == rows[2]["error"] == "ComfyUI did not start: no module named torch"


def test_the_weights_run_in_a_real_comfyui(bench_folder):
    if (found := host.find()) is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH")
    bundle = bench_folder / "tiny-float32" / "ours.safetensors"
    rows = comfyui.rows_in_comfyui(found[0], bundle, [64], 128, CPU, time.monotonic() + 300)
    assert [(row["mode"], row["side"]) for row in rows] == [("CPU", 64), (comfyui.TAESD, 128)]
    for row in rows:
        assert row.keys() == {"mode", "side", "first_seconds", "seconds", "peak_gigabytes"}, row
        assert row["seconds"] > 0
        assert 0.2 < row["peak_gigabytes"] < 8
    row, cells = rows[0], tables(markdown({**HEAD, "comfyui": rows}))["In ComfyUI, with the time to load and save images"][0]
    assert cells["mode"] == "CPU"
    assert float(cells["seconds"]) == pytest.approx(row["seconds"], rel=0.05)
    late, _ = comfyui.rows_in_comfyui(found[0], bundle, [64], 128, CPU, time.monotonic())
    assert late == {"mode": "CPU", "side": 64, "skipped": "no time was left"}


def test_without_a_size_the_real_one_is_meant(capsys):
    assert main(["bench", "--gpu", "--device", "cpu"]) == 2
    assert "no GPU is available here" in capsys.readouterr().err
