"""``tsdsr eval`` on small folders."""

import importlib.util
import json

import pytest
import torch

from tsdsr_core.cli import main
from tsdsr_core.image_io import Picture, write_picture
from tsdsr_core.metrics import psnr_y, ssim_y
from tsdsr_core.restore import bicubic

from .tiny import photo


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
    assert "without a partner" in capsys.readouterr().err
    (folders / "out" / "2.png").unlink()
    write_picture(folders / "out" / "0.bmp", Picture(photo(50, 64)))
    assert evaluate(folders) == 2
    assert "the reference is smaller" in capsys.readouterr().err
    assert main(["eval", "--lq", str(folders / "none"), "--hq", str(folders / "hq")]) == 2
    assert "no such folder" in capsys.readouterr().err
    write_picture(folders / "out" / "0.bmp", Picture(photo(12, 30)))
    assert evaluate(folders) == 2
    assert "different proportions" in capsys.readouterr().err
    write_picture(folders / "lq" / "0.jpg", Picture(photo(12, 16)))
    assert main(["eval", "--lq", str(folders / "lq"), "--hq", str(folders / "hq")]) == 2
    assert "0.jpg and" in capsys.readouterr().err
    (folders / "empty").mkdir()
    assert main(["eval", "--lq", str(folders / "empty"), "--hq", str(folders / "hq")]) == 2
    assert "has no pictures" in capsys.readouterr().err


def test_equal_pictures_are_valid_json(folders, capsys):
    assert main(["eval", "--lq", str(folders / "hq"), "--hq", str(folders / "hq"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["mean"] == {"psnr_y": None, "ssim_y": 1.0}


def test_pictures_too_small_for_ssim_are_named(tmp_path, capsys):
    write_picture(tmp_path / "a" / "x.png", Picture(photo(10, 40)))
    assert main(["eval", "--lq", str(tmp_path / "a"), "--hq", str(tmp_path / "a")]) == 2
    assert "at least 11x11" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("pyiqa") is not None, reason="pyiqa is installed")
def test_a_perceptual_metric_without_its_extra_says_what_to_install(folders, capsys):
    assert evaluate(folders, "--metrics", "lpips") == 2
    assert "tsdsr[metrics]" in capsys.readouterr().err
