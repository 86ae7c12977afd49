"""Training of the small model, on pictures made here."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from tsdsr_core.bundle import read_bundle
from tsdsr_core.diffusers_models import load_bundle
from tsdsr_core.image_io import Picture, read_picture, write_picture
from tsdsr_core.restore import Options, restore
from tsdsr_core.train import small_model, supervised, synthetic
from tsdsr_core.train.__main__ import main
from tsdsr_core.train.config import SupervisedConfig, read_config
from tsdsr_core.train.data import Mixture, PairSource, load_photos

from .tiny import photo

CONFIG = SupervisedConfig(steps=4, decay_steps=2, warmup_steps=2, batch=2, crop=32, save_every=2)


@pytest.fixture(scope="module")
def photos() -> list[torch.Tensor]:
    return [(photo(256, 300, seed)[0] * 255).byte() for seed in range(2)]


def weights(state: supervised.State) -> dict[str, torch.Tensor]:
    return {**state.models.state_dict(), **{f"ema.{k}": v for k, v in state.ema.state_dict().items()}}


def test_two_steps_and_resume_equal_four_straight_steps_bit_for_bit(photos, tmp_path):
    straight = supervised.new_state(CONFIG)
    supervised.train(straight, CONFIG, photos, tmp_path / "straight")
    half = dataclasses.replace(CONFIG, steps=2)
    first = supervised.new_state(CONFIG)
    supervised.train(first, dataclasses.replace(half, decay_steps=0), photos, tmp_path / "half")
    resumed = supervised.load_checkpoint(tmp_path / "half" / "last.pt", CONFIG)
    assert resumed.step == 2
    supervised.train(resumed, CONFIG, photos, tmp_path / "rest")
    expected, found = weights(straight), weights(resumed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_loss_falls(photos):
    config = dataclasses.replace(CONFIG, steps=25, warmup_steps=5, learning_rate=1e-3, synthetic_share=0.0)
    state = supervised.new_state(config)
    source = PairSource(photos, Mixture(32, 4, (("medium", 1.0),), 0.0), torch.Generator().manual_seed(5))
    low, high = source.batch(6)
    losses = []
    for _ in range(25):
        loss = supervised.loss_of(state, config, low, high)
        state.optimiser.zero_grad()
        loss.backward()
        state.optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_training_starts_near_bicubic_enlargement(photos):
    transformer, vae, prompt = small_model.build(0)
    models = torch.nn.ModuleDict({"transformer": transformer, "vae": vae})
    pixels = photo(96, 96, 7)
    with torch.no_grad():
        output = supervised.restore_pixels(models, prompt, pixels, torch.ones(1, 1, 1, 1))
        plain = supervised.restore_pixels(models, prompt, pixels, torch.zeros(1, 1, 1, 1))
    assert torch.equal(output, plain), "the velocity starts at zero"
    inner = (slice(None), slice(None), slice(16, 80), slice(16, 80))  # borders suffer from the zero padding
    both = torch.stack((output[inner].flatten(), pixels[inner].flatten()))
    assert torch.corrcoef(both)[0, 1] > 0.97


def test_an_exported_checkpoint_restores_pictures(photos, tmp_path):
    for index, image in enumerate(photos):
        write_picture(tmp_path / "photos" / f"{index}.png", Picture(image[None].float() / 255))
    (tmp_path / "config.toml").write_text("steps = 1\nbatch = 2\ncrop = 32\n")
    arguments = ["run", tmp_path / "config.toml", "--photos", tmp_path / "photos", "--out", tmp_path / "out"]
    assert main([str(a) for a in arguments]) == 0
    assert main(["export", str(tmp_path / "out" / "last.pt"), "-o", str(tmp_path / "m.safetensors")]) == 0
    bundle = read_bundle(tmp_path / "m.safetensors")
    assert bundle.notes["steps"] == "1"
    model = load_bundle(bundle, torch.device("cpu"), torch.float32)
    low = photo(40, 30)
    result = restore(low, model.restorer(), Options(**bundle.defaults))
    assert result.shape == (1, 3, 160, 120)
    assert (result - torch.nn.functional.interpolate(low, (160, 120), mode="bicubic")).abs().mean() < 0.05


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(photos, tmp_path):
    state = supervised.new_state(CONFIG)
    supervised.train(state, dataclasses.replace(CONFIG, steps=2), photos, tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with torch.no_grad():
        state.models["vae"].decoder.conv_in.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="at step 2"):
        supervised.train(state, CONFIG, photos, tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before


def test_the_schedule_warms_up_holds_and_decays():
    config = SupervisedConfig(steps=100, warmup_steps=10, decay_steps=20, learning_rate=1.0)
    rates = [supervised.learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert set(rates[9:81]) == {1.0}
    assert rates[99] == pytest.approx(1 / 20)


def test_positions_move_in_training_and_not_in_the_average(photos, tmp_path):
    state = supervised.new_state(CONFIG)
    table = state.ema["transformer"].pos_embed.pos_embed.clone()
    supervised.shift_positions(state)
    moved = state.models["transformer"].pos_embed.pos_embed
    assert not torch.equal(moved, table)
    assert torch.equal(moved.sort(1).values, table.sort(1).values), "the same positions elsewhere"
    assert torch.equal(state.ema["transformer"].pos_embed.pos_embed, table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed = 3", "unknown key 'speed'"),
        ("steps = 'many'", "steps = 'many' should be of type int"),
        ("steps = 0", "steps = 0"),
        ("crop = 33", "crop = 33"),
        ("presets = {rain = 1.0}", "rain"),
        ("steps =", "not valid TOML"),
    ],
)
def test_bad_configurations_are_named(text, message, tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(path)
    assert main(["run", str(path), "--photos", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_the_shipped_configuration_is_valid():
    from tsdsr_core import train

    (folder,) = train.__path__
    config = read_config(__import__("pathlib").Path(folder) / "configs" / "builtin.toml")
    assert config.batch * config.crop > 0


def test_photos_that_cannot_be_read_are_reported_once_and_left_out(tmp_path, caplog):
    write_picture(tmp_path / "good.png", Picture(photo(64, 64)))
    write_picture(tmp_path / "small.png", Picture(photo(20, 64)))
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "grey.png")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        assert [p.shape for p in load_photos([tmp_path], 40)] == [(3, 64, 64)]
    assert ["bad.jpg" in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(ValueError, match="no colour image of at least 100x100"):
        load_photos([tmp_path], 100)


def test_batches_follow_the_generator(photos):
    def batch(seed):
        mixture = Mixture(32, 4, (("light", 1.0), ("heavy", 1.0)), 0.5)
        return PairSource(photos, mixture, torch.Generator().manual_seed(seed)).batch(3)

    low, high = batch(1)
    assert low.shape == high.shape == (3, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(batch(1), (low, high), strict=True))
    assert not torch.equal(batch(2)[1], high)
    assert 0.01 < (low - high).abs().mean() < 0.3


def test_synthetic_pictures_are_varied_and_reproducible():
    pictures = [synthetic.picture(64, torch.Generator().manual_seed(seed)) for seed in range(6)]
    assert all(p.shape == (3, 64, 64) and p.dtype == torch.uint8 for p in pictures)
    assert torch.equal(synthetic.picture(64, torch.Generator().manual_seed(3)), pictures[3])
    assert sum(p.float().std() > 20 for p in pictures) >= 4


def test_the_evaluation_set_is_the_same_on_every_run(tmp_path, capsys):
    write_picture(tmp_path / "photos" / "a.png", Picture(photo(600, 520, 1)))
    write_picture(tmp_path / "photos" / "b.png", Picture(photo(512, 700, 2)))
    for run in ("one", "two"):
        assert main(["evalset", str(tmp_path / "photos"), "--out", str(tmp_path / run)]) == 0
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert read_picture(tmp_path / "one" / "lq-light" / "a.png").rgb.shape == (1, 3, 128, 128)
    write_picture(tmp_path / "photos" / "c.png", Picture(photo(100, 700, 2)))
    assert main(["evalset", str(tmp_path / "photos"), "--out", str(tmp_path / "three")]) == 1
    assert "c.png has 700x100 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("presets = {light = 0}", "presets"),
        ("presets = {light = -1.0}", "presets"),
        ('presets = {light = "much"}', "presets"),
        ("crop = 30\nscale = 3", "crop = 30: expected a multiple of 24"),
        ("reconstruction_share = 5.0", "reconstruction_share = 5.0"),
        ("ema_decay = 7.0", "ema_decay"),
        ("clip_norm = 0.0", "clip_norm"),
        ("steps = 0", "steps = 0"),
    ],
)
def test_settings_that_cannot_be_are_named(text, message, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "c.toml")


def test_a_large_crop_trains_on_synthetic_pictures_too(photos):
    source = PairSource(photos, Mixture(200, 4, (("light", 1),), 1.0), torch.Generator().manual_seed(0))
    low, high = source.batch(1)
    assert low.shape == high.shape == (1, 3, 200, 200)


def test_a_finished_run_is_not_overwritten_and_foreign_checkpoints_are_named(photos, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    write_picture(folder / "a.png", Picture(photos[0][None] / 255))
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:900])
    (tmp_path / "c.toml").write_text("steps = 1\nbatch = 1\ncrop = 32\nsave_every = 1")
    arguments = ["run", str(tmp_path / "c.toml"), "--photos", str(folder), "--out", str(out)]
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert f"--resume {out / 'last.pt'}" in capsys.readouterr().err
    assert main([*arguments, "--steps", "0", "--resume", str(out / "last.pt")]) == 1
    assert "steps = 0" in capsys.readouterr().err
    torch.save({"models": 1}, tmp_path / "foreign.pt")
    (tmp_path / "damaged.pt").write_bytes(b"PK\3\4")
    for name in ("foreign.pt", "damaged.pt", "none.pt"):
        assert main(["export", str(tmp_path / name), "-o", str(tmp_path / "x.safetensors")]) == 1
        assert name in capsys.readouterr().err


def test_reconstruction_and_restoration_share_a_batch(photos):
    """With the step's velocity pushed far off, only the restored part of the batch may suffer."""
    config = dataclasses.replace(CONFIG, batch=4, reconstruction_share=0.5, raw_weight=1.0)
    state = supervised.new_state(config)
    high = torch.stack([p[:, :32, :32] for p in photos * 2]) / 255
    before = supervised.loss_of(state, config, high, high).item()
    torch.nn.init.normal_(state.models["transformer"].proj_out.weight, std=10.0)
    after = supervised.loss_of(state, config, high, high)
    kept = supervised.loss_of(state, dataclasses.replace(config, reconstruction_share=1.0), high, high)
    assert after > before + 0.1
    assert kept.item() == pytest.approx(before, rel=1e-4)


def test_gradients_are_clipped(photos, tmp_path, monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def watch(parameters, limit):
        parameters = list(parameters)
        clip(parameters, limit)
        norms.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).norm().item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
    config = dataclasses.replace(CONFIG, clip_norm=1e-3)
    supervised.train(supervised.new_state(config), config, photos, tmp_path)
    assert norms == pytest.approx([1e-3] * config.steps, rel=1e-3)
