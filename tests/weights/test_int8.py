"""int8 weights: the rotation, the rounding, their bundles, and what they change in the result."""

import json
import math

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from tsdsr_core.cli import main
from tsdsr_core.families.bundle import read_bundle, read_description, write_bundle
from tsdsr_core.families.load import from_bundle
from tsdsr_core.families.sd3.config import TRANSFORMER_CONFIG
from tsdsr_core.families.sd3.fold import fold_structure
from tsdsr_core.pipeline import Options, restore
from tsdsr_core.weights.float8 import SCALE, is_matrix
from tsdsr_core.weights.int8 import STORED, dequantise, group, quantise, rotate

from ..support.bundles import merged_bundles, rewrite
from ..support.tiny import photo

CPU = torch.device("cpu")
KEY = "transformer_blocks.0.ff.net.2.weight"
TYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("width", "size"), [(1536, 256), (6144, 256), (128, 64), (32, 16), (48, 16), (24, 1), (8, 1), (1, 1)])
def test_groups_are_powers_of_4_that_divide_the_width(width, size):
    assert group(width) == size
    assert width % size == 0
    assert math.log(size, 4).is_integer()


@pytest.mark.parametrize("width", [16, 32, 64, 256, 768, 24])
def test_the_rotation_is_orthogonal_symmetric_and_regular(width):
    size = group(width)
    matrix = rotate(torch.eye(width))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, torch.eye(width)), "exact: sums of powers of two"
    assert torch.equal(matrix.abs(), torch.block_diag(*[torch.full((size, size), size**-0.5)] * (width // size)))
    assert torch.equal(matrix.sum(0), torch.ones(width)), "a constant stays one"


def test_the_rotation_by_its_digits():
    """Element (i, j) is negative where an odd number of base-4 digits of i and j add up to 3."""
    matrix = rotate(torch.eye(256))
    for i, j in torch.randint(0, 256, (500, 2)).tolist():
        odd = sum((i >> shift & 3) + (j >> shift & 3) == 3 for shift in (0, 2, 4, 6)) % 2
        assert matrix[i, j] == (-1 if odd else 1) / 16


def test_rounding_by_hand():
    """Rows of 24 are not rotated; the scales are 254 / 127 = 2 and 63.5 / 127 = 0.5; halves go to the even number."""
    weight = torch.zeros(3, 24)
    weight[0, :5] = torch.tensor([-254.0, 3.3, 5.0, 0.9, 7.0])
    weight[1, :4] = torch.tensor([63.5, 0.25, -0.75, 1.2])
    stored = quantise({KEY: weight}, torch.float16)
    assert stored[KEY].dtype == STORED
    assert stored[KEY + SCALE].dtype == torch.float32
    assert stored[KEY + SCALE].tolist()[:2] == [[2.0], [0.5]]
    assert stored[KEY][0, :5].tolist() == [-127, 2, 2, 0, 4]
    assert stored[KEY][1, :4].tolist() == [127, 0, -2, 2]
    found = dequantise(stored, torch.float32)[KEY]
    assert found[0, :5].tolist() == [-254, 4, 4, 0, 8]
    assert not found[2].any(), "a row of zeros stays one"


def test_one_rotated_row_by_hand():
    """H4 x H4 / 4 of a row that is 16 in its first element: the first row of H, 4 where it is positive.

    Nothing is lost, since all elements have the same magnitude.
    """
    weight = torch.zeros(1, 16)
    weight[0, 0] = 16
    first = torch.tensor([1.0, 1, 1, -1])
    stored = quantise({KEY: weight}, torch.float32)
    assert torch.equal(stored[KEY].float(), 127 * torch.outer(first, first).flatten()[None])
    assert stored[KEY + SCALE].item() == torch.tensor(4.0).div(127).item()
    torch.testing.assert_close(dequantise(stored, torch.float32)[KEY], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1e-5, 0.02, 500.0])
@pytest.mark.parametrize("width", [24, 64, 768])
def test_the_error_is_half_a_step_in_the_rotated_matrix_and_as_long_in_the_other(size, width):
    torch.manual_seed(0)
    weight = size * torch.randn(200, width)
    weight[:, 3] *= 30  # a column of outliers
    stored = quantise({KEY: weight}, torch.float32)
    scale, exact = stored[KEY + SCALE].double(), dequantise(stored, torch.float32)[KEY]
    half, rounding = scale / 2 * (1 + 1e-4), 1e-6 * weight.abs().max()  # of fp32
    turned = stored[KEY].double() * scale - rotate(weight.double())
    assert (turned.abs() <= half + rounding).all()
    error = exact.double() - weight
    torch.testing.assert_close(error.norm(dim=1), turned.norm(dim=1), rtol=1e-3, atol=float(rounding))
    assert (error.norm(dim=1, keepdim=True) <= width**0.5 * (half + rounding)).all()
    assert (error.abs() <= group(width) ** 0.5 * (half + rounding)).all()
    typical = scale.square().mean().sqrt() / 12**0.5
    assert 0.9 * typical < error.square().mean().sqrt() < 1.1 * typical
    assert (stored[KEY].abs().amax(1) == 127).all(), "the range is used"


def test_rotating_makes_outliers_harmless():
    """One element in 256 that is 50 times as large as the others costs a row without rotation most of its digits."""
    torch.manual_seed(0)
    weight = torch.randn(64, 768)
    weight[:, ::256] *= 50
    error = dequantise(quantise({KEY: weight}, torch.float32), torch.float32)[KEY] - weight
    plain = weight.abs().amax(1, keepdim=True) / 127
    unrotated = (weight / plain).round() * plain - weight
    assert error.norm() < 0.2 * unrotated.norm()


def test_quantising_again_changes_nothing_and_all_types_hold_the_result():
    torch.manual_seed(0)
    stored = quantise({KEY: torch.randn(100, 512)}, torch.float32)
    exact = dequantise(stored, torch.float32)
    again = quantise(exact, torch.float32)
    assert torch.equal(again[KEY], stored[KEY])
    torch.testing.assert_close(again[KEY + SCALE], stored[KEY + SCALE], rtol=1e-6, atol=0)
    for dtype in TYPES:
        assert torch.equal(dequantise(stored, dtype)[KEY], exact[KEY].to(dtype)), "rounded once"


def test_a_product_in_the_rotated_space_is_the_same():
    """``(W R)(R x) = W x``, which is what a host computes."""
    torch.manual_seed(0)
    weight, x = torch.randn(32, 512, dtype=torch.double), torch.randn(5, 512, dtype=torch.double)
    torch.testing.assert_close(rotate(x) @ rotate(weight).T, x @ weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_values_that_int8_cannot_hold_are_named(value):
    weight = torch.ones(2, 16)
    weight[1, 7] = value
    with pytest.raises(ValueError, match=f"NaN or infinite values in {KEY}: the model is damaged"):
        quantise({KEY: weight}, torch.float16)


@pytest.mark.parametrize(("folded", "transformer"), [(False, 2835), (True, 1470)])
def test_sizes_of_sd3_medium(folded, transformer):
    """Megabytes of the transformer in fp16 with int8 matrices, as docs/bundles.md has them; all widths divide by 256."""
    with torch.device("meta"):
        model = SD3Transformer2DModel(**TRANSFORMER_CONFIG)
    if folded:
        fold_structure(model)
    weights = model.state_dict()
    assert {group(weight.shape[1]) for key, weight in weights.items() if is_matrix(key)} == {256}
    sizes = [
        weight.numel() + 4 * len(weight) if is_matrix(key) else 2 * weight.numel()
        for key, weight in weights.items()
    ]  # fmt: skip
    assert round(sum(sizes) / 1e6) == transformer


@pytest.fixture(scope="module")
def bundles(published, tmp_path_factory):
    """The paths of one model's bundles in fp16, whole and folded, with and without int8 weights."""
    return merged_bundles(published, tmp_path_factory.mktemp("int8"), "int8")


@pytest.mark.parametrize("name", ["whole", "fold"])
def test_only_the_transformers_matrices_are_in_int8(name, bundles, tmp_path):
    plain, found = (read_bundle(bundles[key]) for key in (name, f"{name} int8"))
    assert (plain.int8, found.int8, found.eight_bit) == (False, True, False)
    assert found.folded == (name == "fold")
    assert {key: tensor.dtype == STORED for key, tensor in found.transformer.items() if not key.endswith(SCALE)} == {
        key: is_matrix(key) for key in plain.transformer
    }
    assert all(torch.equal(plain.vae[key], found.vae[key]) for key in plain.vae), "the encoder LoRA's change is small"
    assert all(torch.equal(plain.transformer[k], found.transformer[k]) for k in plain.transformer if not is_matrix(k))
    assert [read_description(bundles[key])["version"] for key in bundles] == [1, 2, 4, 4]
    write_bundle(tmp_path / "b.safetensors", found)
    again = read_bundle(tmp_path / "b.safetensors").transformer
    assert again.keys() == found.transformer.keys()
    assert all(torch.equal(again[key], found.transformer[key]) for key in again)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["whole", "fold"])
def test_the_result_is_that_of_weights_dequantised_by_hand(name, dtype, bundles):
    """With the rotation as a matrix, built of Kronecker products here."""
    low, options = photo(30, 20), Options(process_size=0)
    raw = load_file(bundles[f"{name} int8"])
    by_hand = from_bundle(read_bundle(bundles[name]), CPU, dtype)
    four = (torch.ones(4, 4) - 2 * torch.eye(4).flip(1)) / 2
    sixteen, sixtyfour = torch.kron(four, four), torch.kron(four, torch.kron(four, four))
    rotations = {32: torch.block_diag(sixteen, sixteen), 128: torch.block_diag(sixtyfour, sixtyfour)}
    changed = 0
    for key, parameter in by_hand.transformer.named_parameters():
        scale = raw.get(f"transformer.{key}_scale")
        if scale is not None:
            rows = raw[f"transformer.{key}"].float() * scale
            parameter.copy_(rows @ rotations[rows.shape[1]].T)
            changed += 1
    assert changed == sum(map(is_matrix, read_bundle(bundles[name]).transformer))
    model = from_bundle(read_bundle(bundles[f"{name} int8"]), CPU, dtype)
    assert {parameter.dtype for parameter in model.transformer.parameters()} == {dtype}
    found, expected = (restore(low, each.model(), options) for each in (model, by_hand))
    limit = 1e-5 if dtype == torch.float32 else 0.02  # a sum in another order may round to the next number of 16 bits
    assert (found - expected).abs().max() < limit


def test_the_result_stays_closer_than_in_float8(bundles, published, tmp_path):
    low, options = photo(30, 20), Options(process_size=0)
    arguments = ["bundle", "--merge", "--eight-bit", "--model", bundles["whole"], "-o", tmp_path / "8.safetensors"]
    assert main([str(argument) for argument in arguments]) == 0
    results = {name: restore(low, from_bundle(read_bundle(path), CPU, torch.float32).model(), options)
               for name, path in {**bundles, "float8": tmp_path / "8.safetensors"}.items()}  # fmt: skip
    difference, float8 = (results[name] - results["whole"] for name in ("whole int8", "float8"))
    assert 0 < difference.square().mean().sqrt() < 0.005
    assert difference.square().mean() < 0.5 * float8.square().mean(), "7 bits of the largest against 3 bits of each"
    assert (results["whole int8"] - results["fold int8"]).abs().max() < 5e-3, "folded constants in fp16"


def test_a_bundle_becomes_int8_later(bundles, tmp_path):
    """Folding an int8 bundle changes none of its int8 numbers."""
    arguments = ["bundle", "--merge", "--fold", "--int8", "-o", tmp_path / "b.safetensors", "--model", bundles["whole int8"]]
    assert main([str(argument) for argument in arguments]) == 0
    first, later = (read_bundle(path) for path in (bundles["whole int8"], tmp_path / "b.safetensors"))
    assert (later.int8, later.folded) == (True, True)
    matrices = [key for key in later.transformer if is_matrix(key)]
    assert matrices
    assert all(torch.equal(first.transformer[key], later.transformer[key]) for key in matrices)


def test_int8_needs_merged_weights_and_one_choice(published, tmp_path, capsys):
    source = ["--lora-dir", published.loras, "--embedding-dir", published.embeddings, "-o", tmp_path / "x.safetensors"]
    assert main([str(argument) for argument in ["bundle", "--int8", *source]]) == 2
    assert "--int8 needs --merge" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in ["bundle", "--merge", "--int8", "--eight-bit", *source]])
    assert caught.value.code == 2
    assert "--eight-bit: not allowed with argument --int8" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_info_says_so(bundles, capsys):
    facts = []
    for name in ("fold", "fold int8"):
        assert main(["info", str(bundles[name]), "--json"]) == 0
        facts.append(json.loads(capsys.readouterr().out))
    assert "weights" not in facts[0]
    assert facts[1]["weights"].startswith("int8")
    assert facts[0]["parameters"] == facts[1]["parameters"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({KEY + SCALE: None}, f"do not match: {KEY}"),
        ({KEY: torch.zeros(32, 128)}, f"do not match: {KEY}"),
        ({KEY: torch.zeros(32, 128, 1, dtype=STORED)}, f"do not match: {KEY}"),
        ({"proj_out.weight": torch.zeros(64, 32, dtype=STORED), "proj_out.weight_scale": torch.ones(64, 1)}, "match: proj_out"),
        ({KEY + SCALE: -torch.ones(32, 1)}, f"the scales of {KEY}: expected finite fp32 numbers above 0, one for each of 32"),
        ({KEY + SCALE: torch.ones(32)}, f"the scales of {KEY}: expected"),
        ({KEY + SCALE: torch.ones(31, 1)}, f"the scales of {KEY}: expected"),
        ({KEY + SCALE: torch.ones(32, 1).half()}, f"the scales of {KEY}: expected"),
        ({KEY + SCALE: torch.full((32, 1), torch.inf)}, f"NaN or infinite values in {KEY}{SCALE}"),
        ({KEY: torch.zeros(32, 128, dtype=torch.int32)}, f"holds int32 numbers in {KEY}"),
    ],
)  # fmt: skip
def test_damaged_scales_are_named(changes, message, bundles, tmp_path):
    changes = {f"transformer.{key}": tensor for key, tensor in changes.items()}
    path = rewrite(bundles["whole int8"], tmp_path / "x.safetensors", changes)
    with pytest.raises(ValueError, match=rf"x\.safetensors:? .*{message}"):
        read_bundle(path)


def test_int8_is_refused_in_the_vae(bundles, tmp_path):
    weight = {"vae.encoder.conv_in.bias": torch.zeros(8, dtype=STORED)}
    path = rewrite(bundles["whole int8"], tmp_path / "x.safetensors", weight)
    with pytest.raises(ValueError, match=r"holds int8 numbers in encoder\.conv_in\.bias"):
        read_bundle(path)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"int8": 1}, "int8 = 1 in a bundle of kind merged"),
        ({"int8": True, "kind": "lora"}, "int8 = True in a bundle of kind lora"),
        ({"int8": True, "eight_bit": True}, "eight_bit and int8 exclude each other"),
        ({"int8": True}, "do not match: there are none"),
    ],
)
def test_damaged_metadata_is_named(description, message, bundles, tmp_path):
    path = rewrite(bundles["whole"], tmp_path / "x.safetensors", **description)
    with pytest.raises(ValueError, match=message):
        read_bundle(path)
