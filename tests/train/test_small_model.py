"""The small model's start, and its training end to end."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from tsdsr_core.colour import wavelet
from tsdsr_core.families.bundle import BUILTIN, read_bundle, write_bundle
from tsdsr_core.families.load import load
from tsdsr_core.metrics.perceptual import Lpips, read_weights
from tsdsr_core.train.config_file import from_dict
from tsdsr_core.train.data import synthetic
from tsdsr_core.train.data.batch import Batch
from tsdsr_core.train.networks import preview, small_model
from tsdsr_core.train.networks.build import Sources, build_networks
from tsdsr_core.train.networks.roles import STUDENT, TEACHER
from tsdsr_core.train.objectives.flat import flat_error
from tsdsr_core.train.objectives.grid import periodic_error
from tsdsr_core.train.trainers import PretrainTrainer, restored_latent, sharpened

from ..support.tiny import photo

CPU = torch.device("cpu")
MODEL = {"trained": "weights", "layers": 2, "layers_per_block": 1}
CONFIG = from_dict({"stage": "pretrain", "model": MODEL, "data": {"crop": 32}})


@pytest.fixture
def trainer():
    return PretrainTrainer(build_networks(CONFIG, Sources(), CPU), CONFIG)


def pairs(count: int, side: int = 32) -> Batch:
    high = torch.cat([photo(side, side, index) for index in range(count)])
    low = F.avg_pool2d(high, 4)
    low = F.interpolate(low, scale_factor=4.0, mode="bicubic").clamp(0, 1)
    return Batch(low, high, range(count), 0)


def test_training_starts_near_the_input(trainer):
    pixels = photo(96, 96, 7)
    output = trainer.restore(pixels)
    inner = (slice(None), slice(None), slice(16, 80), slice(16, 80))  # borders suffer from the zero padding
    both = torch.stack((output[inner].flatten(), pixels[inner].flatten()))
    assert torch.corrcoef(both)[0, 1] > 0.97


def test_the_loss_falls(trainer):
    batch = pairs(4)
    optimiser = torch.optim.AdamW(list(trainer.groups[STUDENT].parameters.values()), 1e-3)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        losses.append(float(trainer.accumulate(batch, 0, lambda loss: loss.backward())["pixel"]))
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.rounding
def test_latents_shift_and_pictures_stay(monkeypatch):
    monkeypatch.setattr(preview, "IMAGES", 2)
    model, pixels = load("builtin", device=CPU, dtype=torch.float32), photo(64, 64, 7)
    vae, transformer, factor = model.vae, model.transformer, float(model.vae.config["scaling_factor"])
    with torch.no_grad():
        vae.quant_conv.weight[:16] *= 1.5
        vae.quant_conv.bias[:16] += 0.5

    def posterior(pixels):
        with torch.no_grad():
            return vae.encode(pixels).latent_dist

    def encode(pixels):
        return posterior(pixels).mode()

    def restore():
        z = encode(pixels * 2 - 1) * factor
        return model.decode((z - model.velocity(z)) / factor)

    before, (mean, std), spread = restore(), preview.latent_statistics(encode), posterior(pixels).std
    assert mean.abs().max() > 0.3
    gain = 1 / (std * factor)
    assert (gain - 1).abs().max() > 0.1
    small_model.shift_latents(transformer, vae, mean, gain)
    assert torch.allclose(posterior(pixels).std, gain[:, None, None] * spread, rtol=1e-4)
    mean, std = preview.latent_statistics(encode)
    assert mean.abs().max() < 1e-4
    assert (std * factor - 1).abs().max() < 1e-4
    assert (restore() - before).abs().max() < 1e-4


def test_deeper_is_the_same_until_it_is_trained():
    plain, pixels = load("builtin", device=CPU, dtype=torch.float32).vae, photo(64, 64, 7)
    own = plain.config["layers_per_block"]
    deeper = small_model.deepened(plain, own + 2)
    assert len(deeper.decoder.up_blocks[0].resnets) == own + 3
    assert small_model.deepened(plain, own) is plain
    with torch.no_grad():
        latent = plain.encode(pixels).latent_dist.mode()
        assert torch.equal(deeper.encode(pixels).latent_dist.mode(), latent)
        assert torch.equal(deeper.decode(latent).sample, plain.decode(latent).sample)


def live_blocks(vae) -> dict[str, list[int]]:
    """Of each level, from the lowest resolution up."""
    levels = {"encoder": reversed(vae.encoder.down_blocks), "decoder": vae.decoder.up_blocks}
    return {half: [sum(bool(b.conv1.weight.any()) for b in level.resnets) for level in found] for half, found in levels.items()}


@pytest.mark.parametrize(("layers", "decoder"), [(0, [1, 1, 0]), (1, [2, 1, 0]), (4, [5, 1, 0])])
def test_blocks_live_where_they_are_cheap(layers, decoder):
    built = small_model.build(0, 2, layers)[1]
    assert live_blocks(built) == {"encoder": [layers, 0, 0], "decoder": decoder}


def test_what_lives_survives_deepening():
    torch.manual_seed(0)
    vae = AutoencoderKL(**small_model.VAE_CONFIG, layers_per_block=2)
    assert live_blocks(small_model.deepened(vae, 4)) == {"encoder": [4, 2, 2], "decoder": [5, 3, 3]}


def test_live_blocks_learn_and_dead_ones_stay(trainer):
    vae, parameters = trainer.networks.vae, trainer.groups[STUDENT].parameters
    optimiser = torch.optim.AdamW(list(parameters.values()), 1e-3)
    for _ in range(2):  # the first step reaches no further than the second convolutions
        trainer.accumulate(pairs(2), 0, lambda loss: loss.backward())
        optimiser.step()
    live, dead = vae.decoder.up_blocks[0].resnets[1], vae.encoder.down_blocks[0].resnets[0]
    assert all(conv.weight.grad.any() for conv in (live.conv1, live.conv2))
    assert not any(name.startswith("vae.encoder.down_blocks.0.resnets.0.") for name in parameters)
    assert not any(conv.weight.any() for conv in (dead.conv1, dead.conv2))
    with torch.no_grad():
        dead.conv1.weight.fill_(torch.nan)  # seen only if the block ran
    assert trainer.restore(photo(32, 32)).isfinite().all()


def test_a_restored_image_that_is_not_finite_is_an_error_and_no_white_one(trainer):
    with torch.no_grad():
        trainer.networks.vae.decoder.conv_out.bias.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="the restored image is not finite"):
        trainer.restore(photo(32, 32))


def test_the_distance_of_latents_is_in_parts_of_their_variance(trainer):
    """By hand, and blind to how large latents are and how the share that is only encoded fares."""
    batch = pairs(3)
    encode = trainer.networks.vae.encode
    with torch.no_grad():
        target, low = (encode(pixels * 2 - 1).latent_dist.mode() for pixels in (batch.high, batch.low))  # velocity is 0
        by_hand = ((low - target).square().mean((0, 2, 3)) / target.var((0, 2, 3))).mean()
    for share, expected in ((0.0, by_hand), (1.0, torch.tensor(0.0))):
        settings = replace(CONFIG.pretrain, latent_weight=0.5, reconstruction_share=share)
        trainer.settings = settings
        found = trainer.accumulate(batch, 0, lambda loss: None)
        assert torch.allclose(found["latent"], 0.5 * expected, rtol=1e-4)
    trainer.settings = replace(CONFIG.pretrain, latent_weight=0.0)
    assert "latent" not in trainer.accumulate(batch, 0, lambda loss: None)


def test_means_count_by_their_weight(trainer):
    """By hand; 8x8 pixels each."""
    batch = pairs(2)
    settings = replace(CONFIG.pretrain, reconstruction_share=0.0)
    fixed = wavelet(decoded(trainer, batch.low), batch.low, settings.wavelet_levels)
    by_hand = (fixed - batch.high).reshape(2, 3, 4, 8, 4, 8).mean((3, 5)).abs().mean()
    trainer.settings = replace(settings, coarse_weight=2.0)
    assert trainer.accumulate(batch, 0, lambda loss: None)["coarse"].item() == pytest.approx(2 * by_hand.item(), rel=1e-4)
    trainer.settings = settings
    assert "coarse" not in trainer.accumulate(batch, 0, lambda loss: None)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_restored_outputs_are_compared_with_sharper_photographs(trainer, share):
    """Those that are only encoded and decoded with the photographs."""
    batch = pairs(2)
    trainer.settings = settings = replace(CONFIG.pretrain, reconstruction_share=share, sharpening=0.5)
    source, target = (batch.high, batch.high) if share else (batch.low, sharpened(batch.high, 0.5))
    fixed = wavelet(decoded(trainer, source), source, settings.wavelet_levels)
    found = trainer.accumulate(batch, 0, lambda loss: None)["pixel"].item()
    assert found == pytest.approx((fixed - target).abs().mean().item(), rel=1e-4)


@torch.no_grad()
def decoded(trainer: PretrainTrainer, pixels):
    """The output at the start, where the velocity is 0."""
    return trainer.networks.decode(trainer.networks.encode(pixels, student=True))


@pytest.mark.parametrize(("period", "growth"), [(2, 1.5), (4, 1.5), (6, 1.43), (64, 1.0)])
def test_fine_waves_grow_and_broad_ones_stay(period, growth):
    wave = 0.5 + 0.25 * torch.cos(2 * torch.pi * torch.arange(128) / period).expand(1, 3, 128, 128)
    found = sharpened(wave, 0.5)
    inner = (slice(None), slice(None), slice(32, 96), slice(32, 96))
    assert ((found[inner] - 0.5) / (wave[inner] - 0.5)).nanmedian().item() == pytest.approx(growth, abs=0.03)
    assert torch.equal(sharpened(wave, 0.0), wave)
    assert sharpened(wave, 9.0).max() <= 1


@pytest.mark.parametrize("layers", [2, 3])
def test_comfyui_can_tell_the_number_of_blocks(layers):
    """It divides the width by 64."""
    transformer, _, _ = small_model.build(0, layers, 0)
    assert len(transformer.transformer_blocks) == layers == transformer.pos_embed.proj.out_channels // 64


def test_a_base_of_another_depth_than_configured_is_refused():
    config = replace(CONFIG, model=replace(CONFIG.model, layers=3))
    with pytest.raises(ValueError, match=r"has 2 blocks, the configuration 3: set model\.layers=2"):
        build_networks(config, Sources(BUILTIN), CPU)


def test_positions_move_from_step_to_step_and_not_in_what_is_judged(trainer):
    batch, own = pairs(2), trainer.positions.clone()
    tables = []
    for step in (0, 0, 1):
        trainer.accumulate(batch, step, lambda loss: None)
        tables.append(trainer.table.pos_embed.clone())
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    assert all(torch.equal(table.sort(1).values, own.sort(1).values) for table in tables), "the same positions elsewhere"
    trainer.restore(photo(32, 32))
    assert torch.equal(trainer.table.pos_embed, own)


def test_reconstruction_and_restoration_share_a_batch():
    """With the step's velocity pushed far off, only the restored samples may suffer."""
    found = {}
    for share in (0.0, 0.5, 1.0):
        config = replace(CONFIG, pretrain=replace(CONFIG.pretrain, reconstruction_share=share))
        trainer = PretrainTrainer(build_networks(config, Sources(), CPU), config)
        with torch.no_grad():
            trainer.networks.transformers[STUDENT].proj_out.bias.fill_(5.0)
            found[share] = float(trainer.accumulate(pairs(40), 0, lambda loss: None)["raw"])
    assert 0.4 < (found[0.5] - found[1.0]) / (found[0.0] - found[1.0]) < 0.6
    assert found[1.0] < 0.3 * found[0.0]


@pytest.mark.parametrize(("crop", "side"), [(48, 0), (64, 32)])
def test_the_perceptual_term_compares_random_places_after_the_colour_fix(crop, side, perceptual_weights):
    """Its weight times what a second calculation gives, for each sample at its own place of the networks' grid."""
    settings = replace(CONFIG.pretrain, perceptual="lpips-alex", perceptual_weight=0.5, reconstruction_share=0.0)
    settings = replace(settings, perceptual_crop=side)
    config = replace(CONFIG, pretrain=settings, data=replace(CONFIG.data, crop=crop))
    trainer, batch = PretrainTrainer(build_networks(config, Sources(BUILTIN), CPU), config, perceptual_weights), pairs(3, crop)
    totals: list[torch.Tensor] = []
    parts = trainer.accumulate(batch, 0, totals.append)
    with torch.no_grad():
        output = wavelet(
            trainer.networks.decode(restored_latent(trainer.networks, batch.low)), batch.low, settings.wavelet_levels
        )
        lpips, found = Lpips(read_weights(perceptual_weights), "alexnet"), []
        for index, (top, left) in enumerate(batch.shifts(crop - 32).tolist()):
            place = (slice(index, index + 1), slice(None), slice(top, top + 32), slice(left, left + 32))
            found.append(lpips(output[place].clamp(0, 1), batch.high[place]).item())
    assert len({tuple(place) for place in batch.shifts(crop - 32).tolist()}) == 3
    assert parts["perceptual"].item() == pytest.approx(0.5 * sum(found) / 3, rel=1e-4)
    assert totals[0].item() == pytest.approx(sum(map(float, parts.values())), rel=1e-6), "their sum is what is trained"
    assert "perceptual" not in PretrainTrainer(trainer.networks, CONFIG).accumulate(batch, 0, totals.append), "off by default"


def test_the_grid_and_flat_terms_count_by_their_weights_and_with_the_guide(trainer):
    batch = pairs(2)
    trainer.settings = settings = replace(CONFIG.pretrain, reconstruction_share=0.0, grid_weight=2.0, flat_weight=3.0)
    fixed = wavelet(decoded(trainer, batch.low), batch.low, settings.wavelet_levels)
    for guide, aim in ((None, batch.high), (batch.low, batch.low)):
        found = trainer.accumulate(replace(batch, guide=guide), 0, lambda loss: None)
        assert found["grid"].item() == pytest.approx(2 * periodic_error(fixed, aim).item(), rel=1e-3)
        assert found["flat"].item() == pytest.approx(3 * flat_error(fixed, aim, batch.high).item(), rel=1e-3)
    trainer.settings = replace(settings, grid_weight=0.0, flat_weight=0.0)
    assert not {"grid", "flat"} & set(trainer.accumulate(batch, 0, lambda loss: None))


def test_bf16_trains_the_autoencoder_in_16_bit_too_and_takes_the_loss_in_32(trainer):
    trainer.networks.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    seen = []
    trainer.networks.vae.decoder.conv_out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    losses = trainer.accumulate(pairs(2), 0, lambda loss: loss.backward())
    assert seen == [torch.bfloat16]
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    trainer.restore(pairs(1).low)
    assert seen[1:] == [torch.float32], "what is validated runs as it will for people"


def test_the_idle_attention_stays_idle(trainer):
    trainer.accumulate(pairs(2), 0, lambda loss: loss.backward())
    for half in (trainer.networks.vae.encoder, trainer.networks.vae.decoder):
        attention = half.mid_block.attentions[0]
        assert not attention.to_out[0].weight.any()
        assert all(parameter.grad is None for parameter in attention.parameters())


def test_the_idle_attention_costs_nothing_and_changes_nothing():
    pixels, plain = photo(64, 64, 7), load("builtin", device=CPU, dtype=torch.float32).vae
    for stage in ("pretrain", "teacher", "student"):
        vae = build_networks(
            replace(CONFIG, stage=stage, objective=replace(CONFIG.objective, name="supervised")), Sources(BUILTIN), CPU
        ).student_vae
        with torch.no_grad():
            expected = plain.encode(pixels).latent_dist.mode()
            vae.encoder.mid_block.attentions[0].to_q.weight.fill_(torch.nan)  # seen only if the attention ran
            assert torch.equal(vae.encode(pixels).latent_dist.mode(), expected)


def test_a_live_attention_runs(tmp_path):
    bundle = read_bundle(BUILTIN)
    weights = {**bundle.vae, "encoder.mid_block.attentions.0.to_out.0.bias": torch.arange(64.0)}
    write_bundle(tmp_path / "live.safetensors", replace(bundle, vae=weights))
    pixels = photo(64, 64, 7)
    idle, live = (
        build_networks(replace(CONFIG, stage="teacher"), Sources(base), CPU).encode(pixels, student=False)
        for base in (BUILTIN, tmp_path / "live.safetensors")
    )
    assert (idle - live).abs().max() > 1e-3


def test_the_teacher_of_a_small_model_is_its_transformer_alone():
    networks = build_networks(replace(CONFIG, stage="teacher"), Sources(BUILTIN), CPU)
    names = networks.parameters(TEACHER)
    assert names
    assert all(name.startswith("transformer.") for name in names)
    assert not any(p.requires_grad for p in networks.vae.parameters())


def test_synthetic_pictures_are_varied_and_reproducible():
    pictures = [synthetic.draw_image(64, torch.Generator().manual_seed(seed)) for seed in range(6)]
    assert all(p.shape == (3, 64, 64) and p.dtype == torch.uint8 for p in pictures)
    assert torch.equal(synthetic.draw_image(64, torch.Generator().manual_seed(3)), pictures[3])
    assert sum(p.float().std() > 20 for p in pictures) >= 4


def test_the_start_is_a_function_of_the_seed():
    first, second, third = (small_model.build(seed, 2, 1)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)
