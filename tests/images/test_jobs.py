"""Which files are read and written: settled before any work, with one message for whatever cannot be."""

from pathlib import Path

import pytest

from tsdsr_core.images.jobs import Inputs, Job, collect, plan_jobs


@pytest.fixture
def folder(tmp_path) -> Path:
    pictures = tmp_path / "in"
    (pictures / "deeper").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "c.webp", "notes.txt", "deeper/d.png"):
        (pictures / name).touch()
    return pictures


def names(inputs: Inputs) -> list[str]:
    return [path.name for path in inputs.paths]


def test_a_folder_gives_its_own_pictures_in_order(folder):
    found = collect([str(folder)])
    assert names(found) == ["a.JPG", "b.png", "c.webp"]
    assert not found.single


def test_globs_files_and_folders_mix_without_repeats(folder):
    assert names(collect([str(folder / "*.png")])) == ["b.png"]
    assert names(collect([str(folder / "**" / "*.png")])) == ["b.png", "d.png"]
    assert names(collect([str(folder / "c.webp"), str(folder)])) == ["c.webp", "a.JPG", "b.png"]


def test_only_one_named_file_is_single(folder):
    assert collect([str(folder / "b.png")]).single
    assert not collect([str(folder / "*.webp")]).single
    assert not collect([str(folder / "b.png"), str(folder / "c.webp")]).single


def test_a_name_with_brackets_is_a_file_first(folder):
    (folder / "shot[1].png").touch()
    assert names(collect([str(folder / "shot[1].png")])) == ["shot[1].png"]


def test_what_gives_no_picture_is_named(folder):
    (folder / "empty").mkdir()
    for text, message in (("none.png", "no such file"), ("*.bmp", "no such file"), ("empty", "no images in this folder")):
        with pytest.raises(ValueError, match=message) as caught:
            collect([str(folder / text)])
        assert text in str(caught.value)


def test_one_file_goes_to_a_file_or_into_a_folder(folder, tmp_path):
    source = collect([str(folder / "b.png")])
    assert plan_jobs(source, tmp_path / "x.jpg", "error") == [Job(folder / "b.png", tmp_path / "x.jpg")]
    assert plan_jobs(source, tmp_path / "new" / "out", "error")[0].output == tmp_path / "new" / "out" / "b.png"


def test_an_unknown_output_format_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"unknown format '\.gif'"):
        plan_jobs(collect([str(folder / "b.png")]), tmp_path / "x.gif", "error")


@pytest.mark.parametrize("name", ["version-1.5", "new.png"])
def test_a_separator_at_the_end_means_a_folder(name, folder, tmp_path):
    job = plan_jobs(collect([str(folder / "b.png")]), f"{tmp_path / name}/", "error")[0]
    assert job.output == tmp_path / name / "b.png"


def test_hidden_files_are_no_pictures(folder):
    (folder / "._b.png").touch()
    assert names(collect([str(folder)])) == ["a.JPG", "b.png", "c.webp"]


def test_a_folder_called_like_a_picture_is_a_folder(folder, tmp_path):
    (tmp_path / "odd.png").mkdir()
    assert (
        plan_jobs(collect([str(folder / "b.png")]), tmp_path / "odd.png", "error")[0].output == tmp_path / "odd.png" / "b.png"
    )


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("x.png", "expected a folder"),
        ("in", "overwrite an input"),
        ("file.dat", "is an existing file: expected a folder"),
    ],
)
def test_outputs_that_cannot_be(output, message, folder, tmp_path):
    (tmp_path / "file.dat").touch()
    with pytest.raises(ValueError, match=message):
        plan_jobs(collect([str(folder)]), tmp_path / output, "overwrite")


def test_an_input_is_not_overwritten_through_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="overwrite an input"):
        plan_jobs(collect([str(folder)]), tmp_path / "link", "overwrite")


def test_two_results_of_one_name_are_refused(folder, tmp_path):
    (folder / "deeper" / "b.png").touch()
    with pytest.raises(ValueError, match="would both be written"):
        plan_jobs(collect([str(folder), str(folder / "deeper")]), tmp_path / "out", "overwrite")


def test_existing_results(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b.png").touch()
    inputs = collect([str(folder)])
    with pytest.raises(ValueError, match=r"b\.png exists already"):
        plan_jobs(inputs, out, "error")
    assert [job.skip for job in plan_jobs(inputs, out, "skip")] == [False, True, False]
    assert not any(job.skip for job in plan_jobs(inputs, out, "overwrite"))
