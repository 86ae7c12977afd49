"""The exact tiled autoencoder on a GPU, with SD3's widths and random weights; skipped where there is no CUDA device."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tsdsr_core.families.sd3.config import VAE_CONFIG
from tsdsr_core.pipeline import Options, bicubic, match_input
from tsdsr_core.system.device import free_memory, free_ram, release_memory
from tsdsr_core.vae.execute import plan_and_run, run
from tsdsr_core.vae.plan import HEADROOM, plan_tiles
from tsdsr_core.vae.program import decoder_program, encoder_program

from ..support.tiny import photo
from ..vae.test_tiled import ROUNDING, latents, mean_error, pixels, plan_for, untiled, worst
from .test_pipeline import ROUNDING as FINISHING

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE = torch.device("cuda")
PROGRAMS = {"decoder": decoder_program, "encoder": encoder_program}
PLACES = [("device", "device"), ("host", "device"), ("host", "host")]


@pytest.fixture(scope="module")
def sd3():
    """SD3's autoencoder on the device, by type."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE_CONFIG).eval().requires_grad_(False)
    return {dtype: nn.Module.to(copy.deepcopy(vae), DEVICE, dtype) for dtype in (torch.float32, torch.float16)}


@pytest.fixture(autouse=True)
def full_precision():
    """fp32 means fp32: TF32 keeps ten bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def picture(half: str, side: int) -> Tensor:
    """What goes in, on the CPU, not quite square."""
    return latents(side // 8, side // 8 + 3) if half == "decoder" else pixels(side, side + 24)


@pytest.mark.parametrize("half", PROGRAMS)
@pytest.mark.parametrize(("maps", "keys"), PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_give_what_one_piece_gives(sd3, dtype, maps, keys, half):
    """In fp32 but for rounding; in 16 bits no farther from fp64 with the same weights than the untiled run."""
    vae, x = sd3[dtype], picture(half, 256).to(dtype)
    exact = untiled(nn.Module.double(copy.deepcopy(vae)), x.to(DEVICE).double()).cpu()
    usual = untiled(vae, x.to(DEVICE)).cpu()
    program = PROGRAMS[half](vae)
    result = run(program, x if maps == "host" else x.to(DEVICE), plan_for(program, x, 96, maps, keys), DEVICE).cpu()
    assert result.dtype == dtype
    if dtype == torch.float32:
        assert worst(result, usual) <= max(ROUNDING, 2 * worst(usual, exact))
    else:
        assert mean_error(result, exact) <= 1.02 * mean_error(usual, exact)


@pytest.mark.parametrize("when", [1, 40, 200])
def test_an_interrupt_leaves_nothing_changed(sd3, when):
    vae, z = sd3[torch.float32], picture("decoder", 256)
    given, program = z.clone(), decoder_program(vae)
    plan = plan_for(program, z, 64, "host", "host")
    modules = {name: dict(vars(module)) for name, module in vae.named_modules()}
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    good = run(program, z, plan, DEVICE)

    def tick(done, total):
        if done == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(program, z, plan, DEVICE, tick=tick)
    assert {name: dict(vars(module)) for name, module in vae.named_modules()} == modules
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())
    assert torch.equal(z, given)
    assert worst(run(program, z, plan, DEVICE), good) <= 1e-6


def peak_of(work) -> int:
    """Bytes that ``work`` allocates at most beyond what is."""
    release_memory(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    work()
    torch.cuda.synchronize(DEVICE)
    return torch.cuda.max_memory_allocated(DEVICE) - before


@pytest.mark.parametrize("half", PROGRAMS)
def test_4096_in_16_bit_takes_little_of_the_device(sd3, half):
    """Within what the plan was allowed; the workspaces of kernels are in the part that it leaves."""
    vae, free = sd3[torch.float16], int(2.5e9)
    x = torch.randn(1, 16, 512, 512).half() if half == "decoder" else torch.rand(1, 3, 4096, 4096).half()
    program = PROGRAMS[half](vae)
    plan = plan_tiles([op.spec for op in program], *x.shape[2:], 2, free)
    if free_ram() < 1.2 * plan.host_bytes:
        pytest.skip(f"needs {plan.host_bytes / 1e9:.0f} GB of host memory")
    assert plan.maps == "host"
    peak = peak_of(lambda: run(program, x, plan, DEVICE))
    print(f"\n{half} 4096: planned {plan.device_bytes / 1e9:.2f} GB, taken {peak / 1e9:.2f} GB")
    assert peak <= plan.device_bytes / HEADROOM
    assert peak <= free


def test_tiling_takes_little_more_time_than_one_piece(sd3):
    vae, z = sd3[torch.float16], torch.randn(1, 16, 128, 128, device=DEVICE).half()
    program, seconds = decoder_program(vae), {"untiled": [], "tiled": []}
    plan = plan_tiles([op.spec for op in program], 128, 128, 2, free_memory(DEVICE))
    for _ in range(6):
        for name, work in (("untiled", lambda: untiled(vae, z)), ("tiled", lambda: run(program, z, plan, DEVICE))):
            torch.cuda.synchronize(DEVICE)
            start = time.perf_counter()
            work()
            torch.cuda.synchronize(DEVICE)
            seconds[name].append(time.perf_counter() - start)
    print(f"\n1024: untiled {min(seconds['untiled']):.3f} s, tiled {min(seconds['tiled']):.3f} s")
    assert min(seconds["tiled"]) <= 1.25 * min(seconds["untiled"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pictures_come_out_as_on_the_cpu(layout):
    """Up to the rounding of both, with TF32 allowed, as it is by default."""
    torch.backends.cudnn.allow_tf32 = True
    restored, image = photo(256, 384, 1), photo(64, 96, 2).contiguous(memory_format=layout)
    size, options = (512, 768), Options()
    result = match_input(restored.to(DEVICE), image.to(DEVICE), size, options).cpu()
    assert (result - match_input(restored, image, size, options)).abs().max() <= 2 * FINISHING
    assert (bicubic(image.to(DEVICE), size).cpu() - bicubic(image, size)).abs().max() <= 2 * FINISHING


def test_pictures_do_not_strand_memory(sd3):
    """What the streams of one picture freed serves the next."""
    vae, z, reserved = sd3[torch.float16], torch.randn(1, 16, 96, 96).half(), []
    program = decoder_program(vae)
    for _ in range(4):
        run(program, z, plan_for(program, z, 256, "host", "host"), DEVICE)
        torch.cuda.synchronize(DEVICE)
        reserved.append(torch.cuda.memory_reserved(DEVICE))
    assert reserved[3] == reserved[1]


def test_maps_go_to_host_memory_where_the_device_really_runs_out(sd3, caplog):
    """The plan believes in memory that the process may not take."""
    vae, z = sd3[torch.float16], torch.randn(1, 16, 192, 192).half()
    program = decoder_program(vae)
    release_memory(DEVICE)
    _, total = torch.cuda.mem_get_info(DEVICE)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved(DEVICE) + 1.5e9) / total), DEVICE)
    try:
        result = plan_and_run(
            program, z, DEVICE, lambda: 10**11, None, free_ram, release=lambda: release_memory(DEVICE)
        )  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    assert "continuing with them in host memory" in caplog.records[0].getMessage()
    assert worst(result, untiled(vae, z.to(DEVICE)).cpu()) <= 0.02
