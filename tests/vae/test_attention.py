"""Attention of the tiled autoencoder, by torch's kernel and in tiles of keys; which device gets which."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tsdsr_core.errors import InputError
from tsdsr_core.train.dry_run import LiveBytes
from tsdsr_core.vae import attention as vae_attention
from tsdsr_core.vae.attention import in_windows
from tsdsr_core.vae.execute import kernels_of, run
from tsdsr_core.vae.passes import NVIDIA, Kernels, PassSpec
from tsdsr_core.vae.plan import plan_places
from tsdsr_core.vae.program import Attention, Conv, KeyValue, decoder_program

from .test_program import small_vae
from .test_tiled import CPU, ROUNDING, latents, untiled, worst


@pytest.mark.rounding
@pytest.mark.parametrize("sharp", [1, 30])
@pytest.mark.parametrize(("keys", "kernels"), [("device", NVIDIA), ("host", NVIDIA), ("device", Kernels("streamed"))])
def test_attention_is_exact(sharp, keys, kernels):
    """Streamed too, over tiles of keys; also where few keys take nearly all weight and the greatest score comes late."""
    vae = small_vae(8)
    attention = vae.decoder.mid_block.attentions[0]
    attention.to_q.weight.mul_(sharp)
    attention.to_out[0].weight.mul_(5)
    z = latents(70, 67) * torch.linspace(0.1, 3, 70)[:, None]
    vae.decoder.up_blocks = vae.decoder.up_blocks[3:]
    vae.decoder.up_blocks[0].resnets[0] = vae.decoder.mid_block.resnets[1]
    vae.decoder.up_blocks[0].resnets = vae.decoder.up_blocks[0].resnets[:1]
    vae.decoder.conv_norm_out, vae.decoder.conv_out = nn.GroupNorm(8, 64), nn.Conv2d(64, 3, 3, padding=1)
    reference = untiled(nn.Module.double(copy.deepcopy(vae)), z.double())
    usual = worst(untiled(vae, z), reference)
    program = decoder_program(vae)
    plan = plan_places([op.spec for op in program], 70, 67, 4, None, 40, "device", keys, kernels)
    assert plan.streamed == (keys == "host" or kernels != NVIDIA)
    assert worst(run(program, z, plan, CPU), reference) <= max(ROUNDING, 2 * usual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_in_tiles_of_keys_equals_torchs(dtype):
    """In 16 bits it rounds once, and is no farther from fp64 than torch's kernel by more than the last rounding."""
    query, key, value = (torch.randn(1, 512, *size).to(dtype) for size in ((9, 20), (40, 30), (40, 30)))
    pairs = [tuple(part[:, :, top : top + 16] for part in (key, value)) for top in range(0, 40, 16)]
    exact = vae_attention.fused(*(part.double() for part in (query, key, value)))
    usual, ours = vae_attention.fused(query, key, value), vae_attention.streamed(query, pairs)
    assert ours.dtype == dtype
    assert worst(ours, exact) <= max(ROUNDING, worst(usual, exact), torch.finfo(dtype).eps)


def test_attention_in_tiles_of_keys_keeps_few_scores():
    """The greatest tensor is the scores of the queries with one tile of keys."""
    query, key = torch.empty(1, 8, 64, 64, device="meta"), torch.empty(1, 8, 256, 256, device="meta")
    live = LiveBytes([])
    live.known |= {part.untyped_storage()._cdata for part in (query, key)}
    with live:
        vae_attention.streamed(query, ((part, part) for part in (key[:, :, top : top + 16] for top in range(0, 256, 16))))
    assert live.peak < 2.5 * 4 * 64**2 * 16 * 256
    assert live.peak < 4 * 64**2 * 256**2 / 4


def test_the_cpu_keeps_no_scores():
    """torch's kernel there takes a head of 512 in parts: ``fused`` is right for it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        part = torch.randn(1, 512, 40, 50)
        vae_attention.fused(part, part, part)
    assert max(event.cpu_memory_usage for event in taken.events()) < 4 * 2000**2


@pytest.mark.parametrize(
    ("device", "cuda", "cudnn", "efficient", "kernels"),
    [
        ("cuda", "13.0", True, True, NVIDIA),
        ("cuda", "13.0", False, True, Kernels("fused", unfolded=True)),
        ("cuda", "13.0", True, False, Kernels("streamed")),
        ("cuda", None, True, True, Kernels("streamed", unfolded=True)),
        ("xpu", None, True, True, Kernels("streamed", unfolded=True)),
        ("mps", None, True, True, Kernels("streamed", unfolded=True)),
        ("privateuseone", None, True, True, Kernels("streamed", unfolded=True)),
        ("cpu", None, True, True, NVIDIA),
    ],
    ids=["NVIDIA", "without cuDNN", "without efficient attention", "AMD", "Intel", "Apple", "DirectML", "CPU"],
)
def test_kernels_are_trusted_where_they_are_known(monkeypatch, device, cuda, cudnn, efficient, kernels):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch._C, "_has_cudnn", True)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", cudnn)
    monkeypatch.setattr(torch.backends.cuda, "mem_efficient_sdp_enabled", lambda: efficient)
    assert kernels_of(torch.device(device)) == kernels


def test_where_convolutions_write_out_neighbours_maps_stay_contiguous():
    """Their kernel takes no other layout: each tile would be copied back."""
    vae, seen = nn.Module.half(small_vae()), set()
    program, z = decoder_program(vae), latents(9, 7).half()
    vae.decoder.conv_out.register_forward_pre_hook(lambda _, given: seen.add(given[0].is_contiguous()))
    for kernels in (NVIDIA, Kernels("fused", unfolded=True)):
        plan = plan_places([op.spec for op in program], 9, 7, 2, None, 24, "device", "device", kernels)
        run(program, z, plan, CPU)
        assert seen == {kernels.unfolded}
        seen.clear()


def windowed(query, key, value, tile, window):
    """Attention in which each tile of queries sees the cells up to ``window`` beyond it, with a mask over all keys."""
    height, width = query.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    near = [
        (cells[None, :] >= cells[:, None] // tile * tile - window)
        & (cells[None, :] < (cells[:, None] // tile + 1) * tile + window)
        for cells in (rows.flatten(), columns.flatten())
    ]
    q, k, v = (part.flatten(2).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near[0] & near[1]).transpose(1, 2).reshape(query.shape)


@pytest.mark.rounding
@pytest.mark.parametrize("keys", ["device", "host"])
def test_a_window_limits_what_each_tile_sees(keys):
    """Against a mask; a window as large as the image is exact."""
    vae = small_vae(8)
    attention = vae.decoder.mid_block.attentions[0]
    attention.to_q.weight.mul_(20)
    channels = attention.to_q.in_features
    identity = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.dirac_(identity.weight)
    first = Conv("identity", PassSpec("conv", channels, channels, halo=0, measured=True), identity)
    last = Conv("identity", PassSpec("conv", channels, channels, halo=0), identity)
    program = (first, *(op for op in decoder_program(vae) if isinstance(op, KeyValue | Attention)), last)
    z = torch.randn(1, channels, 40, 44)

    def result(window):
        part = in_windows(program, window)
        plan = plan_places([op.spec for op in part], 40, 44, 4, None, None, "device", keys)
        return run(part, z, plan, CPU), plan.steps[-2].tile_height

    exact, near, far = result(None)[0], result(16), result(44)
    normal = attention.group_norm(z).permute(0, 2, 3, 1)
    parts = (getattr(attention, name)(normal).permute(0, 3, 1, 2) for name in ("to_q", "to_k", "to_v"))
    mixed = windowed(*parts, near[1], 16).permute(0, 2, 3, 1)
    assert near[1] <= 16
    assert worst(near[0], z + attention.to_out[0](mixed).permute(0, 3, 1, 2)) <= ROUNDING
    assert worst(far[0], exact) <= ROUNDING
    assert worst(near[0], exact) > 100 * ROUNDING


@pytest.mark.parametrize("window", [15, 0, -1, 16.5, True])
def test_windows_that_are_too_small_are_named(window):
    with pytest.raises(InputError, match=f"VAE attention window {window}: expected a whole number of at least 16"):
        in_windows(decoder_program(small_vae(8)), window)
