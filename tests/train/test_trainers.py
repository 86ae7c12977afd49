"""The three trainers and their loop on small random networks; what a person runs is in ``test_train_command``."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel

from tsdsr_core.families.bundle import BUILTIN, write_bundle
from tsdsr_core.families.load import load, merged_bundle
from tsdsr_core.families.sd3.fold import fold
from tsdsr_core.train.checkpoint import read_checkpoint
from tsdsr_core.train.config import Config
from tsdsr_core.train.config_file import from_dict
from tsdsr_core.train.data.batch import Batch
from tsdsr_core.train.export import export
from tsdsr_core.train.loop import Loop, learning_rate_factor
from tsdsr_core.train.networks import small_model
from tsdsr_core.train.networks.build import Sources, build_networks
from tsdsr_core.train.networks.roles import FAKE, STUDENT, TEACHER
from tsdsr_core.train.trainers import PretrainTrainer, StudentTrainer, TeacherTrainer
from tsdsr_core.weights.prompt import PromptEmbeds, load_prompt, save_prompt

from ..support.tiny import photo

CPU = torch.device("cpu")
TRAINERS = {"pretrain": PretrainTrainer, "teacher": TeacherTrainer, "student": StudentTrainer}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small base and a teacher on its autoencoder, as bundles."""
    folder = tmp_path_factory.mktemp("small")
    transformer, vae, prompt = small_model.build(0, 2, 1)
    for seed, name in enumerate(("base", "teacher")):
        torch.manual_seed(seed)
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.02)
        write_bundle(folder / f"{name}.safetensors", merged_bundle(transformer, vae, prompt, torch.float32, {}, {}))
    return Sources(folder / "base.safetensors", folder / "teacher.safetensors")


@pytest.fixture
def adapted(published):
    return Sources(published.sd3, None, published.embeddings, published.embeddings)


def config(stage: str, trained: str = "weights", **tables) -> Config:
    values = {
        "stage": stage, "model": {"trained": trained, "layers": 2, "rank": 2, **tables.get("model", {})},
        "data": {"crop": 32, "presets": {"light": 1.0}},
        "objective": {"perceptual": "gradients", "guidance": 2.0, **tables.get("objective", {})},
        "optimiser": {"learning_rate": 1e-3, "fake_learning_rate": 1e-3, "warmup_steps": 2, **tables.get("optimiser", {})},
        "run": {"steps": 4, "batch": 2, "save_every": 2, "validate_every": 100, **tables.get("run", {})},
    }  # fmt: skip
    return from_dict(values)


def batches(settings: Config, start: int, stop_after: float = math.inf):
    """Samples that are a function of their number; Ctrl-C before the next one."""
    number = start * settings.run.batch * settings.run.accumulate
    while number < stop_after * settings.run.batch * settings.run.accumulate:
        numbers = range(number, number + settings.run.batch)
        high = torch.cat([photo(32, 32, index) for index in numbers])
        yield Batch((high + 0.1 * torch.roll(high, 1, 3)) / 1.1, high, numbers, settings.run.seed)
        number += settings.run.batch
    raise KeyboardInterrupt


def make(settings: Config, sources: Sources, out) -> Loop:
    trainer = TRAINERS[settings.stage](build_networks(settings, sources, CPU), settings)
    return Loop(trainer, settings, Accelerator(cpu=True), out)


def train(loop: Loop, settings: Config, stop_after: float = math.inf) -> None:
    networks = loop.trainer.networks
    prompt = {"tokens": networks.prompt.tokens, "pooled": networks.prompt.pooled}
    loop.run(batches(settings, loop.step, stop_after), prompt, lambda restore, step: {})


def state(loop: Loop) -> dict[str, torch.Tensor]:
    groups = loop.trainer.groups
    found = {f"{name}.{key}": value for name, group in groups.items() for key, value in group.parameters.items()}
    return {**found, **{f"average.{key}": value for key, value in loop.average.items()}}


STAGES = [("pretrain", "weights"), ("teacher", "weights"), ("student", "weights"), ("teacher", "lora"), ("student", "lora")]


@pytest.mark.parametrize(("stage", "trained"), STAGES)
def test_two_steps_and_resume_equal_four_straight_steps_bit_for_bit(stage, trained, small, adapted, tmp_path):
    sources, settings = small if trained == "weights" else adapted, config(stage, trained)
    straight = make(settings, sources, tmp_path / "straight")
    before = {key: value.detach().clone() for key, value in state(straight).items()}
    train(straight, settings)
    first = make(settings, sources, tmp_path / "halves")
    with pytest.raises(KeyboardInterrupt):
        train(first, settings, stop_after=3)
    assert first.step == 3, "one more than was saved"
    second = make(settings, sources, tmp_path / "halves")
    second.resume(read_checkpoint(tmp_path / "halves" / "last.pt"))
    assert second.step == 2
    train(second, settings)
    expected, found = state(straight), state(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    moved = [key for key in before if not torch.equal(before[key], expected[key])]
    assert len(moved) > 0.5 * len(before), "nearly all that is trained moves"


@pytest.mark.rounding
@pytest.mark.parametrize(("stage", "trained"), STAGES)
def test_bf16_gives_nearly_the_gradients_of_fp32(stage, trained, small, adapted, tmp_path):
    """The networks run in bf16; their weights, the losses and the gradients stay in fp32."""
    sources = small if trained == "weights" else adapted
    found = {}
    for precision in ("fp32", "bf16"):
        settings = config(stage, trained, run={"precision": precision}, optimiser={"learning_rate": 1e-2})
        loop = make(settings, sources, tmp_path / precision)
        if precision == "bf16":
            loop.trainer.networks.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
        batch = next(batches(settings, 0))
        for _ in range(2):  # a fresh adapter's first half has no gradient
            losses = loop._one_step(iter([batch]))
        gradients = [p.grad.flatten() for group in loop.trainer.groups.values() for p in group.parameters.values()]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        found[precision] = losses, torch.cat(gradients)
    (expected, straight), (losses, rounded) = found["fp32"], found["bf16"]
    assert not torch.equal(straight, rounded), "it did run in bf16"
    assert torch.nn.functional.cosine_similarity(straight, rounded, 0) > 0.9
    assert losses == pytest.approx(expected, rel=0.1, abs=1e-3)


@pytest.mark.rounding
@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_checkpointed_activations_give_the_same_gradients(stage, adapted, tmp_path):
    """Layers that run again while gradients flow back must run with the adapter that they ran with."""
    found = []
    for checkpointing in (False, True):
        settings = config(stage, "lora", model={"gradient_checkpointing": checkpointing})
        loop = make(settings, adapted, tmp_path)
        for _ in range(2):  # a fresh adapter's first half has no gradient
            loop._one_step(iter([next(batches(settings, 0))]))
        groups = loop.trainer.groups.items()
        found.append({(role, key): p.grad for role, group in groups for key, p in group.parameters.items()})
    assert all(torch.allclose(found[0][key], found[1][key], atol=1e-6, rtol=1e-4) for key in found[0])


@pytest.mark.rounding
@pytest.mark.parametrize("trained", ["weights", "lora"])
def test_two_batches_of_one_equal_one_batch_of_two(trained, small, adapted, tmp_path):
    """Each sample has its own noise, level and prompt, whatever batch it comes in."""
    sources = small if trained == "weights" else adapted
    found = []
    for run in ({"batch": 2, "accumulate": 1}, {"batch": 1, "accumulate": 2}):
        settings = config("student", trained, run={**run, "steps": 1}, optimiser={"learning_rate": 1e-3, "warmup_steps": 0})
        loop = make(settings, sources, tmp_path / str(run["batch"]))
        train(loop, settings)
        found.append({key: value.grad for key, value in loop.first.items() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    largest = max(float(grad.abs().max()) for grad in found[0].values())
    assert all(torch.allclose(found[0][key], found[1][key], atol=1e-4 * largest) for key in found[0])


@pytest.mark.parametrize("name", ["supervised", "vsd", "tsd", "tsd+dasm"])
def test_objectives_differ_by_name_alone(name, small, tmp_path):
    settings = config("student", objective={"name": name})
    loop = make(settings, small, tmp_path)
    assert list(loop.trainer.groups) == ([STUDENT] if name == "supervised" else [STUDENT, FAKE])
    batch = next(batches(settings, 0))
    losses = loop.trainer.accumulate(batch, 0, lambda loss: loss.backward())
    assert set(losses) == {"latent", "perceptual", *(["distribution", "fake"] if name != "supervised" else [])}
    assert all(math.isfinite(value) for value in losses.values())
    for role in loop.trainer.groups:
        gradients = [p.grad for p in loop.trainer.networks.parameters(role).values()]
        assert any(grad is not None and grad.abs().max() > 0 for grad in gradients)


@pytest.mark.parametrize("trained", ["weights", "lora"])
def test_only_what_is_to_be_trained_gets_gradients(trained, small, adapted, tmp_path):
    settings = config("student", trained)
    networks = build_networks(settings, small if trained == "weights" else adapted, CPU)
    StudentTrainer(networks, settings).accumulate(next(batches(settings, 0)), 0, lambda loss: loss.backward())
    trained_ids = {id(p) for role in (STUDENT, FAKE) for p in networks.parameters(role).values()}
    modules = {id(m): m for m in (*networks.transformers.values(), networks.vae, networks.student_vae)}.values()
    others = [p for module in modules for p in module.parameters() if id(p) not in trained_ids]
    assert others
    assert all(p.grad is None for p in others), "the base, the teacher and the decoder"


def test_the_student_and_its_lora_model_have_adapters_of_their_own(adapted):
    """Training one leaves what the other says; at the start both say what the base says."""
    settings = config("student", "lora")
    networks = build_networks(settings, adapted, CPU)
    z, sigma = torch.randn(1, networks.vae.config["latent_channels"], 8, 8), torch.tensor([0.5])
    condition = networks.prompt

    def said(role: str) -> torch.Tensor:
        with torch.no_grad():
            return networks.velocity(role, z, sigma, condition)

    before = {role: said(role) for role in (STUDENT, TEACHER, FAKE)}
    assert torch.equal(before[STUDENT], before[TEACHER])
    with torch.no_grad():
        for parameter in networks.parameters(FAKE).values():
            parameter.add_(0.1)
    assert not torch.allclose(said(FAKE), before[FAKE], atol=1e-3)
    assert torch.equal(said(STUDENT), before[STUDENT])
    assert torch.equal(said(TEACHER), before[TEACHER])


def test_what_is_not_finite_ends_the_run_and_leaves_the_checkpoint(small, tmp_path):
    settings = config("teacher", run={"steps": 4, "save_every": 1})
    loop = make(settings, small, tmp_path)
    name = "transformer.proj_out.bias"
    loop.first[name].register_hook(lambda gradient: gradient * (torch.nan if loop.step == 2 else 1))
    with pytest.raises(FloatingPointError, match=rf"the gradient of {name} \(1 tensors of teacher\) is not finite at step 2"):
        train(loop, settings)
    assert read_checkpoint(tmp_path / "last.pt").step == 2
    with torch.no_grad():
        loop.first[name].fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the loss teacher is nan at step 2"):
        train(loop, settings)
    assert read_checkpoint(tmp_path / "last.pt").step == 2


def test_averaged_weights_are_those_of_validation_alone(small, tmp_path):
    settings = config("student", run={"ema_decay": 0.9, "validate_every": 2})
    loop, seen = make(settings, small, tmp_path), []
    low = photo(32, 32)
    prompt = {"tokens": torch.zeros(1), "pooled": torch.zeros(1)}
    loop.run(batches(settings, 0), prompt, lambda restore, step: seen.append(restore(low)) or {})
    own = loop.trainer.restore(low)
    assert not torch.equal(seen[-1], own)
    with loop.averaged():
        assert torch.equal(loop.trainer.restore(low), seen[-1])
    assert torch.equal(loop.trainer.restore(low), own)


def test_checkpoints_of_other_models_are_refused(small, adapted, tmp_path):
    settings = config("teacher", run={"steps": 1})
    loop = make(settings, small, tmp_path)
    train(loop, settings)
    other = make(config("teacher", "lora"), adapted, tmp_path / "other")
    checkpoint = read_checkpoint(tmp_path / "last.pt")
    with pytest.raises(ValueError, match="with another autoencoder than --base gives"):
        other.resume(checkpoint)
    with pytest.raises(ValueError, match="the teacher in the checkpoint belongs to another model"):
        other.resume(replace(checkpoint, frozen=other.trainer.networks.frozen))


def test_other_teachers_than_before_are_refused(small, tmp_path):
    settings = config("student", run={"steps": 1})
    train(make(settings, small, tmp_path), settings)
    checkpoint = read_checkpoint(tmp_path / "last.pt")
    assert set(checkpoint.frozen) == {"autoencoder", "prompt", "null prompt", "teacher"}
    with pytest.raises(ValueError, match="with another teacher than --teacher gives: use the one the run started with"):
        make(settings, replace(small, teacher=small.base), tmp_path).resume(checkpoint)


def test_other_bases_prompts_and_teachers_of_adapters_are_refused(adapted, published, tmp_path):
    settings, teaching = config("student", "lora", run={"steps": 1}), config("teacher", "lora", run={"steps": 1})
    for name, seed in (("psi", 0), ("other", 1)):
        loop = make(replace(teaching, run=replace(teaching.run, seed=seed)), adapted, tmp_path / name)
        train(loop, loop.config)
        export(read_checkpoint(tmp_path / name / "last.pt"), tmp_path / name, None, {})
    sources = replace(adapted, teacher=tmp_path / "psi" / "transformer.safetensors")
    train(make(settings, sources, tmp_path), settings)
    checkpoint = read_checkpoint(tmp_path / "last.pt")
    rounded = replace(settings, run=replace(settings.run, precision="bf16"))
    make(rounded, sources, tmp_path).resume(checkpoint)  # the same base in fewer digits
    shutil.copytree(published.sd3, tmp_path / "sd3")
    transformer = SD3Transformer2DModel.from_pretrained(published.sd3 / "transformer")
    with torch.no_grad():
        transformer.norm_out.linear.bias[0] += 0.1
    transformer.save_pretrained(tmp_path / "sd3" / "transformer")
    prompt = load_prompt(adapted.embeddings)
    save_prompt(tmp_path / "p.safetensors", PromptEmbeds(prompt.tokens, prompt.pooled + 0.1))
    for option, other, message in (
        ("base", tmp_path / "sd3", "another transformer than --base gives"),
        ("teacher", tmp_path / "other" / "transformer.safetensors", "another teacher than --teacher gives"),
        ("embeddings", tmp_path / "p.safetensors", "another prompt than --base, --embedding-dir or run.seed"),
        ("null", tmp_path / "p.safetensors", "another null prompt than --null gives"),
    ):
        with pytest.raises(ValueError, match=message):
            make(settings, replace(sources, **{option: other}), tmp_path).resume(checkpoint)


def test_other_files_are_refused_by_name(small, tmp_path):
    settings, path = config("teacher", run={"steps": 1}), tmp_path / "last.pt"
    train(make(settings, small, tmp_path), settings)
    values = torch.load(path, weights_only=True)
    del values["frozen"]
    for broken, message in (
        (values, "is damaged, frozen missing"), ({**values, "version": 1}, "of version 1: this program reads version 2"),
        ([1], "is not a checkpoint of tsdsr train"),
    ):  # fmt: skip
        torch.save(broken, path)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)


@pytest.mark.parametrize("damage", [
    {"optimisers": {}}, {"optimisers": {"teacher": {}}}, {"optimisers": {"teacher": {"state": {0: {"step": torch.ones(())}}}}},
    {"optimisers": {"teacher": {"state": {0: dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), torch.ones(()))}}}},
    {"optimisers": {"teacher": {"state": {10**6: {}}}}}, {"optimisers": {"teacher": {"state": []}}},
    {"average": {}}, {"weights": {}},
])  # fmt: skip
def test_checkpoints_without_what_a_run_goes_on_from_are_refused(damage, small, tmp_path):
    settings, path = config("teacher", run={"steps": 1}), tmp_path / "last.pt"
    train(make(settings, small, tmp_path), settings)
    torch.save({**torch.load(path, weights_only=True), **damage}, path)
    loop = make(settings, small, tmp_path)
    before = {name: value.clone() for name, value in state(loop).items()}
    with pytest.raises(ValueError, match=r"the (optimiser of the teacher|average|teacher) in the checkpoint (is|belongs)"):
        loop.resume(read_checkpoint(path))
    assert all(torch.equal(value, before[name]) for name, value in state(loop).items()), "nothing is changed"


def test_settings_of_the_optimiser_hold_after_resuming(small, tmp_path):
    settings = config("teacher", run={"steps": 1})
    train(make(settings, small, tmp_path), settings)
    changed = config("teacher", optimiser={"weight_decay": 0.5, "beta2": 0.7})
    loop = make(changed, small, tmp_path / "other")
    loop.resume(read_checkpoint(tmp_path / "last.pt"))
    (group,) = loop.optimisers[TEACHER].param_groups
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.9, 0.7))
    assert loop.seen == settings.run.batch


def test_learning_rates_by_hand():
    cosine = config("student", optimiser={"warmup_steps": 4, "cycles": 2}).optimiser
    assert [learning_rate_factor(cosine, step, 12) for step in (0, 3, 4, 6, 8, 10)] == pytest.approx([0.25, 1, 1, 0.5, 1, 0.5])
    linear = config("student", optimiser={"warmup_steps": 2, "schedule": "linear", "decay_steps": 4}).optimiser
    assert [learning_rate_factor(linear, step, 10) for step in (0, 1, 5, 6, 8, 9)] == pytest.approx([0.5, 1, 1, 1, 0.5, 0.25])


@pytest.mark.parametrize(
    ("stage", "trained", "sources", "message"),
    [
        ("student", "weights", {}, "needs --base"),
        ("teacher", "weights", {}, "needs --base"),
        ("student", "weights", {"base": BUILTIN}, "needs --teacher"),
        ("student", "lora", {}, "needs --base, an SD3 folder, and --embedding-dir"),
    ],
)
def test_missing_sources_are_named(stage, trained, sources, message):
    with pytest.raises(ValueError, match=message):
        build_networks(config(stage, trained), Sources(**sources), CPU)


@pytest.mark.parametrize("option", ["base", "teacher"])
def test_folded_bundles_are_refused(option, small, tmp_path):
    whole = load(small.base, device=CPU)
    fold(whole.transformer, whole.prompt.pooled)
    bundle = merged_bundle(whole.transformer, whole.vae, whole.prompt, torch.float32, {}, {})
    write_bundle(tmp_path / "folded.safetensors", bundle)
    with pytest.raises(ValueError, match=f"--{option} .*folded.safetensors is folded"):
        build_networks(config("student"), replace(small, **{option: tmp_path / "folded.safetensors"}), CPU)


def test_embeddings_of_another_model_are_refused(adapted, tmp_path):
    prompt = load_prompt(adapted.embeddings)
    save_prompt(tmp_path / "short.safetensors", PromptEmbeds(prompt.tokens[:, :2], prompt.pooled))
    save_prompt(tmp_path / "narrow.safetensors", PromptEmbeds(prompt.tokens[:, :, :2], prompt.pooled))
    for option, name, message in (
        ("null", "short", "--null has 2 tokens, --embedding-dir"), ("null", "narrow", "--null has embeddings of widths"),
        ("embeddings", "narrow", "--embedding-dir has embeddings of widths"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            build_networks(config("student", "lora"), replace(adapted, **{option: tmp_path / f"{name}.safetensors"}), CPU)


def test_a_teacher_on_another_autoencoder_is_refused(small, tmp_path):
    """However near; a base in fp32 and its teacher, exported in fp16, have the same one."""
    transformer, vae, prompt = small_model.build(0, 2, 1)
    torch.nn.init.normal_(vae.encoder.mid_block.resnets[0].conv2.weight, std=0.01)
    for change, name in ((0, "base"), (0, "same"), (1e-3, "other")):
        with torch.no_grad():
            vae.decoder.conv_out.bias += change
        dtype = torch.float32 if name == "base" else torch.float16
        write_bundle(tmp_path / f"{name}.safetensors", merged_bundle(transformer, vae, prompt, dtype, {}, {}))
    base = tmp_path / "base.safetensors"
    build_networks(config("student"), Sources(base, tmp_path / "same.safetensors"), CPU)
    with pytest.raises(ValueError, match="was trained with another autoencoder"):
        build_networks(config("student"), Sources(base, tmp_path / "other.safetensors"), CPU)
