"""Configurations of training: what is checked, and how it is said."""

from dataclasses import asdict

import pytest

from tsdsr_core.cli.train import override
from tsdsr_core.train.config import Config
from tsdsr_core.train.config_file import from_dict, read_config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed = 3", "unknown key speed; known keys: data, model,"),
        ("[run]\nspeed = 3", "unknown key run.speed; known keys: run.accumulate,"),
        ("run = 3", r"run = 3: expected a table \[run\]"),
        ("stage = 'dance'", "stage = 'dance': expected one of pretrain, teacher, student"),
        ("[run]\nsteps = 'many'", "run.steps = 'many': expected a whole number"),
        ("[run]\nsteps = 0", "run.steps = 0: expected at least 1"),
        ("[run]\nsteps = true", "run.steps = True: expected a whole number"),
        ("[run]\nema_decay = 7.0", "run.ema_decay = 7.0: expected a number from 0 to 1"),
        ("[run]\nprecision = 'fp16'", "run.precision = 'fp16': expected one of fp32, bf16"),
        ("[data]\ncrop = 33", "data.crop = 33: expected a multiple of 16"),
        ("[data]\ncrop = 32\nscale = 3", "data.crop = 32: expected a multiple of 48"),
        ("[data.presets]\nrain = 1.0", "rain"),
        ("[data]\npresets = {light = 0}", "data.presets"),
        ("[data]\npresets = {light = -1.0}", "data.presets"),
        ('[data]\npresets = {light = "much"}', "data.presets"),
        ("[data]\npresets = {light = inf}", "data.presets"),
        ("[data]\ncontrast = 0.5", "data.contrast = 0.5: expected a number of at least 1"),
        ("[optimiser]\nlearning_rate = 0.0", "optimiser.learning_rate = 0.0: expected a number above 0"),
        ("[optimiser]\nclip_norm = nan", "optimiser.clip_norm = nan"),
        ("[run]\nseed = 9223372036854775808", r"run.seed = 9223372036854775808: expected a whole number from -2\^63"),
        ("[optimiser]\nbeta2 = 1.0", "optimiser.beta2 = 1.0: expected a number from 0 to below 1"),
        ("[objective]\nname = 'gan'", "objective.name = 'gan': expected one of supervised, vsd, tsd"),
        ("[objective]\ntrajectory_steps = 30", "a trajectory of 30 steps, 50 indices apart, does not fit"),
        ("[objective]\nlast_index = 1000", "objective.last_index = 1000: expected less than 1000"),
        ("[objective]\nas_scores = true\nfirst_index = 0", "objective.first_index = 0: expected at least 1 with as_scores"),
        ("[model]\nlayers = 1", "model.layers = 1: expected at least 2"),
        ("stage = 'pretrain'", "set model.trained = 'weights'"),
        (
            "[objective]\nperceptual = 'ssim'",
            "objective.perceptual = 'ssim': expected one of gradients, lpips, lpips-alex, dists",
        ),
        (
            "[pretrain]\nperceptual = 'ssim'",
            "pretrain.perceptual = 'ssim': expected one of gradients, lpips, lpips-alex, dists",
        ),
        ("[pretrain]\nperceptual_weight = -1.0", "pretrain.perceptual_weight = -1.0: expected a number of at least 0"),
        (
            "stage = 'pretrain'\n[model]\ntrained = 'weights'\n[data]\ncrop = 32\n[pretrain]\nperceptual_weight = 1.0",
            "data.crop = 32: expected at least 48 with pretrain.perceptual_weight",
        ),
        (
            "stage = 'pretrain'\n[model]\ntrained = 'weights'\n[data]\ncrop = 64\n"
            "[pretrain]\nperceptual_weight = 1.0\nperceptual_crop = 49",
            r"pretrain.perceptual_crop = 49: expected 0, or 32 to 48 \(data.crop less 16\)",
        ),
        ("[pretrain]\nflat_weight = -1.0", "pretrain.flat_weight = -1.0: expected a number of at least 0"),
        ("[pretrain]\ngrid_weight = -1.0", "pretrain.grid_weight = -1.0: expected a number of at least 0"),
        ("[optimiser]\nlearning_rate = 1" + "0" * 400, r"optimiser.learning_rate = 10+\.\.\.0+: expected a whole number from"),
        ("[run]\nbatch = 100000000000000000000", "run.batch = 1(0){20}: expected a whole number from"),
        ("[data]\npresets = {light = 1" + "0" * 400 + "}", "data.presets"),
        ("[data]\npresets = {light = true}", "data.presets"),
        ("[objective]\nstride = 0", "objective.stride = 0: expected at least 1"),
        ("[objective]\ntrajectory_steps = 0", "objective.trajectory_steps = 0: expected at least 1"),
        ("steps =", "cannot be read as a TOML file"),
        ("steps = " + "[" * 5000, "cannot be read as a TOML file"),
        ("steps = " + "9" * 5000, "cannot be read as a TOML file"),
    ],
)
def test_what_cannot_be_trained_with_is_named(text, message, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(tmp_path / "c.toml")
    assert "c.toml" in str(caught.value)


def test_a_configuration_comes_back_from_its_dictionary():
    config = from_dict({"stage": "teacher", "run": {"steps": 7}, "data": {"presets": {"light": 1, "heavy": 2.5}}})
    assert config.run.steps == 7
    assert from_dict(asdict(config)) == config
    assert from_dict({}) == Config()


def test_settings_are_changed_by_name():
    config = override(Config(), ["run.steps=5", "stage=teacher", "optimiser.learning_rate=1e-3", 'data.presets={"light": 1.0}'])
    assert (config.run.steps, config.stage, config.optimiser.learning_rate) == (5, "teacher", 1e-3)
    assert config.data.presets == {"light": 1.0}
    for change, message in (("run.steps", "expected TABLE.KEY=VALUE"), ("a.b.c=1", "expected TABLE"), ("run.x=1", "run.x"),
                            ("run.steps=" + "[" * 99999, "run.steps"), ("run.steps=" + "9" * 5000, "run.steps")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            override(Config(), [change])


@pytest.mark.parametrize(
    ("name", "share", "levels"), [("supervised", 0.7, 1), ("vsd", 1.0, 1), ("tsd", 0.7, 1), ("tsd+dasm", 0.7, 4)]
)
def test_objectives_are_one_flag(name, share, levels):
    objective = from_dict({"objective": {"name": name}}).objective
    assert objective.vsd_part() == share
    assert len(objective.trajectory().offsets) == levels


def test_configurations_of_before_the_perceptual_term_still_load():
    values = asdict(Config())
    for name in ("perceptual", "perceptual_weight"):
        del values["pretrain"][name]
    assert from_dict(values) == Config()
    assert Config().pretrain.perceptual_weight == 0


def test_a_stage_has_the_perceptual_distance_of_its_own_table():
    pretrain = {"perceptual": "dists", "perceptual_weight": 0.1}
    off = {"perceptual_weight": 0.0, "perceptual_weight_end": 0.0}
    for stage, objective, expected in (
        ("pretrain", {}, "dists"), ("teacher", {}, None), ("student", {}, "lpips"), ("student", off, None),
        ("student", {"perceptual": "lpips-alex"}, "lpips-alex"), ("student", {"perceptual_weight": 0.0}, "lpips"),
    ):  # fmt: skip
        values = {"stage": stage, "objective": objective, "pretrain": pretrain, "model": {"trained": "weights"}}
        assert from_dict(values).perceptual == expected
    assert from_dict({"stage": "pretrain", "model": {"trained": "weights"}}).perceptual is None
