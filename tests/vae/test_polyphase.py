import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tsdsr_core.vae.polyphase import PolyphaseConvolution
from tsdsr_core.vae.program import decoder_program

from .test_program import small_vae
from .test_tiled import latents, tiled, untiled


def operations(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 2), (16, 9)])
@pytest.mark.parametrize("biased", [True, False])
def test_is_enlargement_and_convolution(size, biased):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 6, *size, dtype=torch.float64), torch.randn(4, 6, 3, 3, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64) if biased else None
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    torch.testing.assert_close(PolyphaseConvolution(weight, bias, x.dtype)(x), expected)


def test_takes_four_ninths_of_the_products():
    x, weight = torch.zeros(1, 8, 99, 99), torch.zeros(8, 8, 3, 3)
    whole = operations(lambda: F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1))
    assert operations(lambda: PolyphaseConvolution(weight, None, x.dtype)(x)) / whole == pytest.approx(4 / 9, rel=0.03)


def test_decoding_in_fp32_takes_fewer_products_than_untiled():
    vae, z = small_vae(), latents(32, 32)
    assert operations(lambda: tiled(decoder_program(vae), z)) < 0.9 * operations(lambda: untiled(vae, z))
