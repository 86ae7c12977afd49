"""``tsdsr eval`` on small folders."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch

from tsdsr_core.cli import main
from tsdsr_core.cli.evaluate import NATIVE, PAPER
from tsdsr_core.images.files import Picture, read_picture, write_picture
from tsdsr_core.metrics.fidelity import flat_noise, naturalness, psnr_y, ssim_y
from tsdsr_core.metrics.niqe import niqe
from tsdsr_core.metrics.perceptual import Dists, Lpips, read_weights
from tsdsr_core.metrics.spectrum import grid_peaks, sharpness
from tsdsr_core.pipeline import bicubic

from ..support.tiny import photo


@pytest.fixture
def folders(tmp_path):
    for index in range(2):
        high = photo(48, 64, index)
        write_picture(tmp_path / "hq" / f"{index}.png", Picture(high))
        write_picture(tmp_path / "out" / f"{index}.bmp", Picture((high + 0.02).clamp(0, 1)))
        write_picture(tmp_path / "lq" / f"{index}.png", Picture(bicubic(high, (12, 16))))
    return tmp_path


def evaluate(folder, *arguments) -> int:
    return main(["eval", "--lq", str(folder / "out"), "--hq", str(folder / "hq"), *arguments])


def test_figures_are_those_of_the_metrics(folders, capsys):
    assert evaluate(folders, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    high = torch.cat([photo(48, 64, index) for index in range(2)])
    result = (((high + 0.02).clamp(0, 1)) * 255).round() / 255
    for name, metric in (("psnr_y", psnr_y), ("ssim_y", ssim_y)):
        expected = metric(result, high)
        assert [report["files"][str(i)][name] for i in range(2)] == pytest.approx(expected.tolist(), rel=1e-6)
        assert report["mean"][name] == pytest.approx(expected.mean().item(), rel=1e-6)


def test_the_table_ends_in_the_means(folders, capsys):
    assert evaluate(folders, "--metrics", "psnr_y") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("mean")
    assert "psnr_y" in lines[0]
    assert "ssim_y" not in lines[0]


def test_inputs_are_enlarged_bicubically(folders, capsys):
    assert main(["eval", "--lq", str(folders / "lq"), "--hq", str(folders / "hq"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["files"]["0"]["psnr_y"]
    low = (bicubic(photo(48, 64), (12, 16)) * 255).round() / 255
    assert found == pytest.approx(psnr_y(bicubic(low, (48, 64)), photo(48, 64)).item(), rel=1e-6)


def test_what_cannot_be_compared_is_named(folders, capsys):
    write_picture(folders / "out" / "2.png", Picture(photo(48, 64)))
    assert evaluate(folders) == 2
    assert "without a counterpart" in capsys.readouterr().err
    (folders / "out" / "2.png").unlink()
    write_picture(folders / "out" / "0.bmp", Picture(photo(50, 64)))
    assert evaluate(folders) == 1
    assert "the reference is smaller" in capsys.readouterr().err
    assert main(["eval", "--lq", str(folders / "none"), "--hq", str(folders / "hq")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    write_picture(folders / "out" / "0.bmp", Picture(photo(12, 30)))
    assert evaluate(folders) == 1
    assert "different proportions" in capsys.readouterr().err
    write_picture(folders / "lq" / "0.jpg", Picture(photo(12, 16)))
    assert main(["eval", "--lq", str(folders / "lq"), "--hq", str(folders / "hq")]) == 2
    assert "0.jpg and" in capsys.readouterr().err
    (folders / "empty").mkdir()
    assert main(["eval", "--lq", str(folders / "empty"), "--hq", str(folders / "hq")]) == 2
    assert "has no images" in capsys.readouterr().err


def test_a_picture_that_does_not_suit_costs_the_others_nothing(large, capsys, pyiqa):
    assert evaluate(large, "--metrics", "niqe", "psnr_y", "fid", "--json", "--device", "cpu") == 0
    whole = json.loads(capsys.readouterr().out)
    write_picture(large / "hq" / "small.png", Picture(photo(90, 90)))
    write_picture(large / "out" / "small.png", Picture(photo(90, 90)))
    write_picture(large / "hq" / "wide.png", Picture(photo(96, 192)))
    write_picture(large / "out" / "wide.png", Picture(photo(96, 100)))
    assert evaluate(large, "--metrics", "niqe", "psnr_y", "fid", "--json", "--device", "cpu") == 1
    output = capsys.readouterr()
    report = json.loads(output.out)
    failed = report.pop("failed")
    assert report == whole
    assert list(failed) == ["small", "wide"]
    assert "small.png: an image of 90x90 pixels is too small for NIQE" in failed["small"]
    assert "have different proportions" in failed["wide"]
    assert output.err.count("failed: ") == 2


def test_equal_pictures_are_valid_json(folders, capsys):
    assert main(["eval", "--lq", str(folders / "hq"), "--hq", str(folders / "hq"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["mean"] == {"psnr_y": None, "ssim_y": 1.0}


def test_pictures_too_small_for_ssim_are_named(tmp_path, capsys):
    write_picture(tmp_path / "a" / "x.png", Picture(photo(10, 40)))
    assert main(["eval", "--lq", str(tmp_path / "a"), "--hq", str(tmp_path / "a")]) == 2
    assert "at least 11x11" in capsys.readouterr().err


FOREIGN = [name for name in PAPER if name not in NATIVE]
OWN = ("naturalness", "sharpness", "grid_8", "grid_16")


@pytest.fixture
def large(tmp_path):
    """Pictures large enough for a spectrum and for NIQE; the first result has half the size."""
    for index in range(2):
        high = photo(96, 192, index)
        write_picture(tmp_path / "hq" / f"{index}.png", Picture(high))
        low = (high + 0.02).clamp(0, 1) if index else bicubic(high, (48, 96))
        write_picture(tmp_path / "out" / f"{index}.bmp", Picture(low))
    return tmp_path


def test_figures_without_a_reference_come_with_those_of_the_references(large, capsys):
    assert evaluate(large, "--metrics", "psnr_y", *OWN, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    for index in range(2):
        high = read_picture(large / "hq" / f"{index}.png").rgb
        image = bicubic(read_picture(large / "out" / f"{index}.bmp").rgb, (96, 192))
        expected = {"sharpness": sharpness, "grid_8": lambda x: grid_peaks(x, 8), "grid_16": lambda x: grid_peaks(x, 16)}
        for name, metric in expected.items():
            assert report["files"][str(index)][name] == pytest.approx(metric(image).item(), rel=1e-6)
            assert report["reference_files"][str(index)][name] == pytest.approx(metric(high).item(), rel=1e-6)
        assert report["files"][str(index)]["naturalness"] == pytest.approx(naturalness(image, high).item(), rel=1e-6)
    assert list(report["mean"]) == ["psnr_y", *OWN]
    assert list(report["reference"]) == ["sharpness", "grid_8", "grid_16"]
    for row, files in (("mean", "files"), ("reference", "reference_files")):
        for name, value in report[row].items():
            assert value == pytest.approx(sum(report[files][str(i)][name] for i in range(2)) / 2)


def test_the_table_leaves_the_cells_of_references_empty_that_they_do_not_have(large, capsys):
    assert evaluate(large, "--metrics", "psnr_y", "grid_8") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "mean", "reference"]
    assert [len(line.split()) for line in lines] == [2, 3, 3, 3, 2]
    assert lines[-1].endswith(lines[-1].split()[1])
    assert len({len(line) for line in lines}) == 1


def test_reports_without_such_figures_have_no_such_rows(large, capsys):
    assert evaluate(large, "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == {"files", "mean"}


def test_a_picture_too_small_for_a_figure_is_named(folders, capsys):
    assert evaluate(folders, "--metrics", "grid_8") == 2
    error = capsys.readouterr().err
    assert "0.bmp: an image of 64x48 pixels is too small" in error


def test_an_unknown_device_is_named(large, capsys):
    assert evaluate(large, "--device", "abacus") == 2
    assert "unknown device 'abacus'" in capsys.readouterr().err


def test_metrics_without_their_extra_say_what_to_install(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    for name, missing in (("lpips", "needed for lpips:"), ("paper", f"needed for {', '.join(FOREIGN)}:")):
        assert evaluate(folders, "--metrics", name) == 2
        error = capsys.readouterr().err
        assert missing in error
        assert "pip install -e '.[metrics]'" in error
        assert "lpips, lpips-vgg, dists need only --perceptual-weights FILE" in error


class StandIn:
    """As much of pyiqa as the command uses, with figures that tell what it was asked."""

    def __init__(self, name: str, device: torch.device) -> None:
        assert device == torch.device("cpu")
        print("Loading pretrained model")  # as pyiqa does, where a report in JSON goes
        self.name, self.metric_mode = name, "FR" if name in ("lpips", "dists") else "NR"

    def __call__(self, image, reference=None, **settings):
        print("Found pictures")
        if self.name == "fid":
            assert settings == {"num_workers": 0}
            sets = [[read_picture(path).rgb for path in sorted(Path(folder).iterdir())] for folder in (image, reference)]
            return sum((a - b).abs().mean() for a, b in zip(*sets, strict=True))  # fails for unequal sizes
        if self.name == "musiq" and image.mean() > 0.9:
            raise AssertionError("too bright")
        assert (reference is None) == (self.metric_mode == "NR")
        return image.mean() if reference is None else (image - reference).abs().mean()


@pytest.fixture
def pyiqa(monkeypatch):
    standin = SimpleNamespace(list_models=lambda: [*FOREIGN, "offline", "broken"], create_metric=StandIn)
    monkeypatch.setitem(sys.modules, "pyiqa", standin)
    return standin


def test_paper_stands_for_the_table_of_the_paper(large, capsys, pyiqa):
    assert evaluate(large, "--metrics", "paper", "--device", "cpu", "--json") == 0
    output = capsys.readouterr()
    report = json.loads(output.out)
    assert "Loading pretrained model" in output.err
    assert list(report["mean"]) == [name for name in PAPER if name != "fid"]
    assert list(report["reference"]) == ["niqe", "musiq", "maniqa-pipal", "clipiqa"]
    high, image = (
        torch.cat([bicubic(read_picture(large / folder).rgb, (96, 192)) for folder in names])
        for names in (("hq/0.png", "hq/1.png"), ("out/0.bmp", "out/1.bmp"))
    )
    assert report["mean"]["lpips"] == pytest.approx((image - high).abs().mean().item(), rel=1e-5)
    assert report["mean"]["musiq"] == pytest.approx(image.mean().item(), rel=1e-5)
    assert report["reference"]["musiq"] == pytest.approx(high.mean().item(), rel=1e-5)
    assert report["mean"]["niqe"] == pytest.approx(niqe(image).mean().item(), rel=1e-6)
    rounded = (image * 255).round() / 255
    assert report["set"] == {"fid": pytest.approx(2 * (rounded - high).abs().mean().item(), rel=1e-4)}


def test_columns_keep_the_order_asked_for_and_sets_have_a_row(large, capsys, pyiqa):
    assert evaluate(large, "--metrics", "fid", "maniqa-pipal", "psnr_y", "fid", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["fid", "maniqa-pipal", "psnr_y"]
    assert [line.split()[0] for line in lines[1:]] == ["0", "1", "mean", "reference", "set"]
    assert [len(line.split()) for line in lines[1:]] == [3, 3, 3, 2, 2]
    assert len({len(line) for line in lines}) == 1


def test_what_pyiqa_cannot_do_is_one_clear_error(large, capsys, pyiqa, monkeypatch):
    def create(name, device):
        if name == "offline":
            raise URLError("Name or service not known")
        if name == "broken":
            raise ModuleNotFoundError("No module named 'pkg_resources'")
        return StandIn(name, device)

    monkeypatch.setattr(pyiqa, "create_metric", create)
    write_picture(large / "out" / "1.bmp", Picture(torch.ones(1, 3, 96, 192)))
    for name, message in (
        ("sharpnes", "unknown metrics sharpnes: expected names from --help or from pyiqa.list_models()"),
        ("offline", "metric offline: its weights cannot be downloaded"),
        ("broken", "metric broken: a package that pyiqa needs is missing: pip install -e '.[metrics]'"),
    ):
        assert evaluate(large, "--metrics", name, "--device", "cpu") == 2
        output = capsys.readouterr()
        assert message in output.err
        assert not output.out
    assert evaluate(large, "--metrics", "musiq", "--device", "cpu") == 1
    output = capsys.readouterr()
    assert "1.bmp: metric musiq fails: AssertionError: too bright" in output.err
    assert [line.split()[0] for line in output.out.splitlines()[1:]] == ["0", "mean", "reference"]


def test_sets_of_one_picture_are_refused(large, capsys, pyiqa):
    for path in (large / "hq" / "1.png", large / "out" / "1.bmp"):
        path.unlink()
    assert evaluate(large, "--metrics", "fid", "--device", "cpu") == 2
    assert "fid: expected at least 2 images to compare sets" in capsys.readouterr().err


def test_lpips_and_dists_come_from_a_file_without_pyiqa(large, perceptual_weights, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    names = ["lpips-vgg", "psnr_y", "lpips", "dists"]
    assert (
        evaluate(large, "--metrics", *names, "--perceptual-weights", str(perceptual_weights), "--device", "cpu", "--json") == 0
    )
    report, weights = json.loads(capsys.readouterr().out), read_weights(perceptual_weights)
    assert list(report["mean"]) == names
    assert "reference" not in report, "equal pictures have no distance"
    networks = {"lpips": Lpips(weights, "alexnet"), "lpips-vgg": Lpips(weights, "vgg16"), "dists": Dists(weights)}
    for index in range(2):
        high = read_picture(large / "hq" / f"{index}.png").rgb
        image = bicubic(read_picture(large / "out" / f"{index}.bmp").rgb, (96, 192))
        for name, network in networks.items():
            assert report["files"][str(index)][name] == pytest.approx(network(image, high).item(), rel=1e-5)


def test_a_file_of_weights_that_is_none_is_one_line(large, tmp_path, capsys):
    (tmp_path / "text.safetensors").write_text("hello")
    for name, message in (
        ("none", "does not exist: expected a file of perceptual weights"),
        ("text", "is damaged, truncated or not a safetensors file"),
    ):
        path = tmp_path / f"{name}.safetensors"
        assert evaluate(large, "--metrics", "lpips", "--perceptual-weights", str(path)) == 2
        output = capsys.readouterr()
        assert f"{path}" in output.err
        assert message in output.err
        assert "tsdsr perceptual-weights" in output.err
        assert output.err.count("\n") == 1


def test_a_picture_too_small_for_a_network_is_named(folders, perceptual_weights, capsys):
    for folder, suffix in (("out", "bmp"), ("hq", "png")):
        write_picture(folders / folder / f"0.{suffix}", Picture(photo(24, 32)))
    assert evaluate(folders, "--metrics", "lpips", "--perceptual-weights", str(perceptual_weights)) == 1
    assert "0.bmp: an image of 32x24 pixels and 3 channels: expected 3 channels and at least 31x31" in capsys.readouterr().err


def test_flat_noise_is_taken_of_the_references_too_and_means_leave_out_what_has_none(tmp_path, capsys):
    smooth, stripes = 0.4 + photo(64, 64, 1) / 20, (torch.arange(64) // 6 % 2).expand(1, 3, 64, 64) * 0.5
    for name, high in (("smooth", smooth), ("stripes", stripes)):
        write_picture(tmp_path / "hq" / f"{name}.png", Picture(high))
        noise = torch.rand(high.shape, generator=torch.Generator().manual_seed(0)) / 10
        write_picture(tmp_path / "out" / f"{name}.png", Picture((high + noise).clamp(0, 1)))
    assert evaluate(tmp_path, "--metrics", "flat_noise", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    image, high = (read_picture(tmp_path / folder / "smooth.png").rgb for folder in ("out", "hq"))
    for row, files, pair in (("mean", "files", (image, high)), ("reference", "reference_files", (high, high))):
        assert report[files]["stripes"]["flat_noise"] is None
        assert report[row]["flat_noise"] == report[files]["smooth"]["flat_noise"]
        assert report[row]["flat_noise"] == pytest.approx(flat_noise(*pair).item(), rel=1e-6)
    assert report["mean"]["flat_noise"] > 2 * report["reference"]["flat_noise"]


def test_an_image_named_as_a_row_of_the_table_keeps_its_own(tmp_path, capsys):
    for folder in ("lq", "hq"):
        for number, name in enumerate(("mean", "other", "reference")):
            write_picture(tmp_path / folder / f"{name}.png", Picture(photo(64, 64, number + (folder == "hq"))))
    assert main(["eval", "--lq", str(tmp_path / "lq"), "--hq", str(tmp_path / "hq"), "--metrics", "psnr_y", "sharpness"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == ["mean", "other", "reference", "mean", "reference"]
