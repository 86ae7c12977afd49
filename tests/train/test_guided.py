"""Training samples that come with the result of another restorer."""

import pytest
import torch
from safetensors.torch import load_file

from tsdsr_core.pipeline import bicubic
from tsdsr_core.system.atomic import write_tensors
from tsdsr_core.train.data.dataset import Mixture, Pairs
from tsdsr_core.train.data.guided import METADATA_KEY, Guided, is_guided, write_guided

from ..support.tiny import photo
from .test_data import fill

CROP, SCALE, MARGIN = 64, 4, 32
MIXTURE = Mixture(48, SCALE, (("light", 1.0),), 0.0)


@pytest.fixture
def samples(tmp_path):
    """Two files of two samples; the guide is the photograph, darker."""
    made = {}
    for number in range(2):
        wide = torch.cat([photo(CROP + 2 * MARGIN, CROP + 2 * MARGIN, 2 * number + index) for index in range(2)])
        high = wide[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
        low = bicubic(wide, (32, 32))
        made[number] = {
            name: (255 * image).round().byte() for name, image in (("high", high), ("low", low), ("guide", high / 2))
        }
        write_guided(tmp_path / "guides" / f"{number}.safetensors", made[number], CROP, SCALE)
    return tmp_path / "guides"


def test_low_high_and_guide_show_the_same_place(samples):
    pairs = Pairs([samples], MIXTURE, 0)
    for index in range(8):
        sample = pairs[index]
        assert all(image.shape == (3, 48, 48) for image in sample.values())
        assert (sample["guide"] - sample["high"] / 2).abs().max() < 0.003
        assert (sample["low"] - sample["high"]).abs().mean() < 0.6 * (sample["low"].flip(2) - sample["high"]).abs().mean()
        assert torch.equal(Pairs([samples], MIXTURE, 0)[index]["high"], sample["high"]), "a function of seed and number"


def test_beside_photographs_the_photograph_is_the_guide(samples, tmp_path):
    fill(tmp_path / "photos", 2, size=(130, 140))
    pairs = Pairs([(samples, 1.0), (tmp_path / "photos", 1.0)], MIXTURE, 0)
    same = [torch.equal(pairs[index]["guide"], pairs[index]["high"]) for index in range(12)]
    assert any(same)
    assert not all(same)
    assert "guide" not in Pairs([tmp_path / "photos"], MIXTURE, 0)[0]


def test_folders_that_do_not_fit_are_named(samples, tmp_path):
    for mixture in (Mixture(80, SCALE, MIXTURE.presets, 0.0), Mixture(32, 2, MIXTURE.presets, 0.0)):
        with pytest.raises(
            ValueError, match=r"guides has crops of 64 pixels at scale 4, the training (80 at scale 4|32 at scale 2)"
        ):
            Pairs([samples], mixture, 0)
    assert not is_guided(tmp_path)
    write_tensors(tmp_path / "newer" / "0.safetensors", {"high": torch.zeros(1)}, {METADATA_KEY: '{"version": 9}'})
    with pytest.raises(ValueError, match="samples of version 9, this program reads version 1: update"):
        Guided(tmp_path / "newer")
    with pytest.raises(ValueError, match="is a prepared folder: expected a folder of photographs"):
        Pairs([samples], MIXTURE, 0).photograph(torch.Generator().manual_seed(0))


def test_a_damaged_file_is_left_out(samples, caplog):
    path = samples / "1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    pairs = Pairs([samples], MIXTURE, 0)
    assert all(pairs[index]["high"].shape == (3, 48, 48) for index in range(6))
    assert "1.safetensors is damaged, truncated or not a safetensors file: make it again" in caplog.text


HEADER = '{"version": 1, "crop": 64, "scale": 4}'


@pytest.mark.parametrize(
    ("change", "header", "said"),
    [
        ({}, "{bad", "has damaged metadata in tsdsr_guided"),
        ({}, "[1]", "expected version 1, and a crop that is a multiple of scale"),
        ({}, '{"version": 1, "crop": "64", "scale": 4}', "expected version 1, and a crop"),
        ({}, '{"version": 1, "crop": 64, "scale": 0}', "expected version 1, and a crop"),
        ({}, '{"version": 1, "crop": 64, "scale": NaN}', "NaN"),
        ({"guide": None}, HEADER, "expected high and guide of (N, 3, 64, 64) and low of (N, 3, 32, 32)"),
        ({"high": (0, 3, 64, 64), "guide": (0, 3, 64, 64), "low": (0, 3, 32, 32)}, HEADER, "N at least 1"),
        ({"low": (1, 3, 32, 32)}, HEADER, "expected high"), ({"high": ()}, HEADER, "expected high"),
        ({"low": (2, 3, 33, 32)}, HEADER, "expected high"), ({"guide": (2, 3, 48, 48)}, HEADER, "expected high"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", [0, 1])
def test_a_file_of_odd_content_is_left_out_by_name(change, header, said, number, samples, caplog):
    path = samples / f"{number}.safetensors"
    tensors = load_file(path)
    for name, shape in change.items():
        del tensors[name]
        if shape is not None:
            tensors[name] = torch.zeros(shape, dtype=torch.uint8)
    write_tensors(path, tensors, {METADATA_KEY: header})
    pairs = Pairs([samples], MIXTURE, 0)
    assert all(pairs[index]["high"].shape == (3, 48, 48) for index in range(6))
    if change:  # of samples that are sound, the header of one file is enough
        assert f"{path.name} has" in caplog.text
        assert said in caplog.text
    for other in samples.iterdir():
        if other != path:
            other.unlink()
    with pytest.raises(ValueError, match=r"safetensors has .*make it again|none of its 1 files can be read") as caught:
        Pairs([samples], MIXTURE, 0)[0]
    assert change or said in str(caught.value)
