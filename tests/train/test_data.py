"""Training pairs from folders of photographs, made here."""

import itertools
import logging
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tsdsr_core.errors import InputError
from tsdsr_core.images.files import Picture, write_picture
from tsdsr_core.train.data import dataset as data
from tsdsr_core.train.data import photos as photos_module
from tsdsr_core.train.data.dataset import Mixture, Pairs
from tsdsr_core.train.data.loader import loader
from tsdsr_core.train.data.photos import Photos
from tsdsr_core.train.data.randomness import generator_for

from ..support.tiny import photo

MIXTURE = Mixture(32, 4, (("light", 1.0), ("medium", 1.0)), 0.0)
SMALLEST = 96
"""The crop with 32 pixels of surroundings on each side."""


def fill(folder, count, size=(110, 130), first=0):
    for index in range(first, first + count):
        write_picture(folder / f"{index}.png", Picture(photo(*size, index)))
    return folder


def colour(folder, name, rgb, count=1):
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.new("RGB", (SMALLEST, SMALLEST), rgb).save(folder / f"{name}{index}.png")
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.fixture
def photos(tmp_path):
    return fill(tmp_path / "photos", 3)


@pytest.fixture
def quick(monkeypatch):
    """Degradations that cost nothing; their presets and sizes are recorded."""
    calls = []

    def shrink(image, scale, preset, generator):
        calls.append((preset, tuple(image.shape)))
        return F.avg_pool2d(image, scale)

    monkeypatch.setattr(data, "degrade", shrink)
    return calls


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_generators_hang_on_their_arguments_alone():
    assert generator_for(0, 0, "pairs").initial_seed() == 4558820137505307228  # the same on every machine and in every process
    others = [(1, 2, "pairs"), (2, 1, "pairs"), (1, 22, "pairs"), (12, 2, "pairs"), (1, 2, "noise")]
    assert len({torch.rand((), generator=generator_for(*arguments)).item() for arguments in others}) == len(others)


def test_an_index_gives_the_same_sample_in_every_dataset_and_order(photos):
    one, other = (Pairs([photos], MIXTURE, seed=7) for _ in range(2))
    drawn = [one[index] for index in range(4)]
    assert all(same(other[index], drawn[index]) for index in (3, 1, 0, 2))
    assert same(pickle.loads(pickle.dumps(other))[3], drawn[3])
    for a, b in itertools.combinations([*drawn, Pairs([photos], MIXTURE, seed=8)[0]], 2):
        assert not torch.equal(a["high"], b["high"])
        assert not torch.equal(a["low"], b["low"])


def test_samples_are_pairs_of_low_and_high_quality(photos):
    drawn = [Pairs([photos], MIXTURE, seed=0)[index] for index in range(8)]
    for sample in drawn:
        assert sample.keys() == {"low", "high"}
        for image in sample.values():
            assert image.shape == (3, 32, 32)
            assert image.dtype == torch.float32
            assert image.min() >= 0
            assert image.max() <= 1
    low, high = (torch.stack([sample[name] for sample in drawn]) for name in ("low", "high"))
    error = (low - high).abs().mean()
    assert error > 0.005
    assert error < 0.7 * (low.roll(1, 0) - high).abs().mean(), "nearer to its own than to another"


def test_without_presets_nothing_is_degraded(photos):
    sample = Pairs([photos], replace(MIXTURE, presets=()), seed=0)[0]
    assert sample["high"].std() > 0.01
    assert torch.equal(sample["low"], sample["high"])


def test_workers_change_nothing(photos):
    dataset = Pairs([photos], MIXTURE, seed=3)
    plain, parallel = (loader(dataset, 2, 10, 0, 1, workers) for workers in (0, 2))
    for step in range(4):
        batch, other = next(plain), next(parallel)
        assert same(batch, other)
        assert torch.equal(batch["high"][1], dataset[10 + 2 * step + 1]["high"])
    assert batch["low"].shape == (2, 3, 32, 32)


class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return {"number": torch.tensor(index)}


def numbers(steps, *arguments):
    return [batch["number"].tolist() for batch in itertools.islice(loader(Numbers(), *arguments), steps)]


def test_processes_share_the_samples_of_one():
    alone = numbers(4, 3, 5, 0, 1, 0)
    assert alone == [[5, 6, 7], [8, 9, 10], [11, 12, 13], [14, 15, 16]]
    first, second = (numbers(2, 3, 5, rank, 2, 0) for rank in (0, 1))
    assert [first[0], second[0], first[1], second[1]] == alone
    assert numbers(1, 3, 5 + 2 * 2 * 3, 1, 2, 0) == numbers(3, 3, 5, 1, 2, 0)[2:], "resumed"


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(workers):
    torch.manual_seed(0)
    numbers(2, 1, 0, 0, 1, workers)
    drawn = torch.rand(())
    torch.manual_seed(0)
    assert drawn == torch.rand(())


def test_crops_keep_their_surroundings_and_are_turned_and_shrunk(tmp_path, quick):
    """Red and green say where a pixel came from."""
    side = 250
    row, column = np.mgrid[0:side, 0:side].astype(np.uint8)
    (tmp_path / "map").mkdir()
    Image.fromarray(np.dstack((row, column, 0 * row))).save(tmp_path / "map" / "a.png")
    dataset = Pairs([tmp_path / "map"], replace(MIXTURE, crop=16), seed=0)
    orientations, steps, corners = set(), set(), []
    for index in range(120):
        high = (dataset[index]["high"] * 255)[:2]
        down, right = (high[:, 1, 0] - high[:, 0, 0]).round(), (high[:, 0, 1] - high[:, 0, 0]).round()
        step = int(down.abs().max())
        steps.add(step)
        orientations.add((tuple((down / step).tolist()), tuple((right / step).tolist())))
        expected = high[:, :1, :1] + down[:, None, None] * torch.arange(16)[:, None] + right[:, None, None] * torch.arange(16)
        assert (high - expected).abs().max() < 0.01
        margin = 32 * step - 0.5
        assert high.min() >= margin
        assert high.max() <= side - 1 - margin
        corners.append(tuple(high.amin((1, 2)).tolist()))
    assert steps == {1, 2, 3}
    assert len(orientations) == 8
    assert len(set(corners)) > 70
    assert {shape for _, shape in quick} == {(3, 80, 80)}


def test_crops_with_detail_are_drawn_more_often(tmp_path, quick):
    """Stripes with four times the steps of others, against each other."""
    for name, height in (("faint", 20), ("strong", 80)):
        pixels = np.full((SMALLEST, SMALLEST, 3), 100, np.uint8)
        pixels[:, ::2] += np.uint8(height)
        (tmp_path / "s").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "s" / f"{name}.png")
    for candidates, share in ((1, 0.5), (2, 0.25 + 0.5 * 0.8)):  # with two, both strong, or one of each
        dataset = Pairs([tmp_path / "s"], replace(MIXTURE, candidates=candidates), seed=0)
        strong = sum(bool(dataset[index]["high"].max() > 0.6) for index in range(400))
        assert strong == pytest.approx(400 * share, abs=40)  # 4 standard deviations


def test_contrast_grows_by_a_factor_about_the_mean_and_channels_trade_places():
    own = torch.Generator().manual_seed(0)
    picture = 0.5 + 0.02 * torch.randn(3, 16, 16, generator=own) + torch.tensor([-0.1, 0, 0.1])[:, None, None]
    mean = picture.mean((1, 2), keepdim=True)
    strengths = []
    for _ in range(400):
        found = data.recoloured(picture, replace(MIXTURE, contrast=4.0), own)
        factor = ((found - mean).norm() / (picture - mean).norm()).item()
        assert torch.allclose(found, mean + factor * (picture - mean), atol=1e-5)
        strengths.append(np.log(factor) / np.log(4))
    changed = [strength for strength in strengths if strength > 1e-5]
    assert len(changed) == pytest.approx(200, abs=40)  # 4 standard deviations
    assert np.quantile(changed, [0.02, 0.5, 0.98]) == pytest.approx([0, 0.5, 1], abs=0.15)
    orders = [data.recoloured(picture, replace(MIXTURE, permute_channels=True), own) for _ in range(100)]
    assert len({tuple(found[:, 0, 0].tolist()) for found in orders}) == 6
    assert all(torch.equal(found.sort(0).values, picture.sort(0).values) for found in orders)


def test_what_is_recoloured_stays_a_picture_and_is_degraded_afterwards(tmp_path, quick):
    folder = fill(tmp_path / "photos", 2)
    plain = Pairs([folder], MIXTURE, 0)
    dataset = Pairs([folder], replace(MIXTURE, contrast=8.0, permute_channels=True), 0)
    for index in range(12):
        low, high = dataset[index]["low"], dataset[index]["high"]
        assert high.min() >= 0
        assert high.max() <= 1
        pooled = torch.stack([F.avg_pool2d(part, 4).flatten() for part in (low, high)])
        assert torch.corrcoef(pooled)[0, 1] > 0.9, "the same colours in both"
    assert not any(torch.equal(dataset[index]["high"], plain[index]["high"]) for index in range(3))


def shares(dataset, count):
    """How many of ``count`` samples are plain red."""
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 32, 32)
    return sum(torch.equal(dataset[index]["high"], red) for index in range(count))


def test_folders_are_drawn_from_by_their_weights(tmp_path, quick):
    red, blue = colour(tmp_path / "red", "r", "red"), colour(tmp_path / "blue", "b", "blue", 4)
    # of 400 samples; 4 standard deviations are 35
    assert shares(Pairs([(red, 3.0), (blue, 1.0)], MIXTURE, 0), 400) == pytest.approx(300, abs=35)
    assert shares(Pairs([red, blue], MIXTURE, 0), 400) == pytest.approx(80, abs=32), "each picture as often as any other"


def test_presets_and_synthetic_images_have_their_shares(tmp_path, quick):
    red = colour(tmp_path / "red", "r", "red")
    mixture = Mixture(32, 4, (("light", 1.0), ("heavy", 3.0)), 0.25)
    assert shares(Pairs([red], mixture, 0), 400) == pytest.approx(300, abs=35)
    assert [preset for preset, _ in quick].count("heavy") == pytest.approx(300, abs=35)


def test_damaged_pictures_are_reported_once_and_replaced_by_the_same_others(photos, caplog):
    truncate(photos / "1.png")
    (photos / "none.jpg").write_bytes(b"no picture")
    dataset = Pairs([photos], MIXTURE, seed=0)
    drawn = [dataset[index] for index in range(12)]
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert ["none.jpg" in messages[0], "1.png" in messages[1]] == [True, True], messages
    assert len(messages) == 2
    for index in (11, 5, 0):  # a dataset that does not know the damaged file yet draws what one that does drew
        assert same(Pairs([photos], MIXTURE, seed=0)[index], drawn[index])


def test_what_a_worker_found_damaged_is_not_reported_again(photos, caplog):
    truncate(photos / "1.png")
    dataset = Pairs([photos], MIXTURE, seed=0)
    batches = loader(dataset, 6, 0, 0, 1, workers=2)
    drawn = [next(batches), next(batches)]
    caplog.clear()
    assert torch.equal(torch.stack([dataset[index]["high"] for index in range(12)]), torch.cat([b["high"] for b in drawn]))
    assert not caplog.records
    assert dataset.sources[0].bad.tolist() == [False, True, False]


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_in_workers_stay_one_line(workers):
    class Broken(torch.utils.data.Dataset):
        def __getitem__(self, index):
            raise InputError(f"no sample {index}")

    with pytest.raises(ValueError, match=r"^no sample 4$"):
        next(loader(Broken(), 2, 4, 0, 1, workers))


def test_a_folder_of_nothing_but_damaged_pictures_is_an_error(photos):
    for path in photos.iterdir():
        truncate(path)
    with pytest.raises(ValueError, match=r"photos: none of its 3 files can be read"):
        Pairs([photos], MIXTURE, seed=0)[0]


def test_pictures_that_do_not_serve_are_counted_in_one_line(photos, caplog):
    fill(photos, 2, (SMALLEST - 1, 300), first=10)
    write_picture(photos / "grey.png", Picture(photo(100, 100), grey=True))
    Image.fromarray(np.zeros((120, 120), np.uint16)).save(photos / "deep.png")
    dataset = Pairs([photos], MIXTURE, seed=0)
    assert [path.name for path in dataset.sources[0].paths] == ["0.png", "1.png", "2.png"]
    (record,) = caplog.records
    assert "left out images: 2 below 96x96 pixels, 2 grey" in record.getMessage()


def test_folders_without_pictures_are_named(tmp_path, photos):
    (tmp_path / "empty").mkdir()
    for folders, message in (
        ([], "no folder"),
        ([photos, tmp_path / "empty"], "empty: no images in this folder"),
        ([tmp_path / "none"], "none: no such file"),
        ([fill(tmp_path / "small", 2, (40, 300))], "no colour image of at least 96x96 pixels in .*small"),
    ):
        with pytest.raises(ValueError, match=message):
            Pairs(folders, MIXTURE, seed=0)


def test_weights_that_cannot_be_are_named(photos):
    for folders, message in (
        ([(photos, 1.0), photos], "1 of 2 folders have a weight"),
        ([(photos, 0.0)], r"weights \[0.0\]"),
        ([(photos, float("nan"))], r"weights \[nan\]"),
    ):
        with pytest.raises(ValueError, match=message):
            Pairs(folders, MIXTURE, seed=0)


def test_photographs_have_no_captions(photos):
    with pytest.raises(ValueError, match=r"no captions in .*photos: .*prepare --captions"):
        Pairs([photos], MIXTURE, seed=0, captions=True)


def test_the_latest_photographs_are_kept_up_to_a_number_of_bytes(photos, monkeypatch):
    decoded, read = [], photos_module.read_pixels
    monkeypatch.setattr(photos_module, "read_pixels", lambda path: decoded.append(path.name) or read(path))
    folder = Photos(photos, SMALLEST, cache_bytes=2 * 3 * 110 * 130)
    for position in (0, 1, 0, 2, 0, 1):
        expected = (photo(110, 130, position)[0] * 255).round().byte()
        assert torch.equal(folder.read(position), expected)
    assert decoded == ["0.png", "1.png", "2.png", "1.png"], "1 was used longest ago when 2 came"
    single = Photos(photos, SMALLEST, cache_bytes=1)
    assert torch.equal(single.read(0), single.read(0))
    assert decoded[4:] == ["0.png"], "one is kept however large"
