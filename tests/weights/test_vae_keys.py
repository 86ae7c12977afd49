"""Weight names of the autoencoder, over every weight of SD3's."""

import pytest
import torch
from diffusers import AutoencoderKL

from tsdsr_core.families.sd3.config import VAE_CONFIG
from tsdsr_core.weights.vae_keys import to_diffusers, to_original, weights_to_diffusers, weights_to_original


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return AutoencoderKL(**{**VAE_CONFIG, "use_quant_conv": True, "use_post_quant_conv": True}).state_dict()


@pytest.mark.parametrize(
    ("diffusers", "original"),
    [
        ("encoder.conv_in.weight", "encoder.conv_in.weight"),
        ("encoder.down_blocks.1.resnets.0.conv_shortcut.bias", "encoder.down.1.block.0.nin_shortcut.bias"),
        ("encoder.down_blocks.2.downsamplers.0.conv.weight", "encoder.down.2.downsample.conv.weight"),
        ("encoder.mid_block.resnets.1.conv2", "encoder.mid.block_2.conv2"),
        ("encoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid.attn_1.proj_out.weight"),
        ("encoder.mid_block.attentions.0.group_norm.bias", "encoder.mid.attn_1.norm.bias"),
        ("encoder.down_blocks.0.resnets.1.norm2.weight", "encoder.down.0.block.1.norm2.weight"),
        ("encoder.conv_norm_out.weight", "encoder.norm_out.weight"),
        ("decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
        ("decoder.up_blocks.2.upsamplers.0.conv.bias", "decoder.up.1.upsample.conv.bias"),
        ("post_quant_conv.weight", "post_quant_conv.weight"),
    ],
)
def test_names(diffusers, original):
    assert to_original(diffusers, 4) == original
    assert to_diffusers(original, 4) == diffusers


def test_every_weight_goes_there_and_back(weights):
    original = weights_to_original(weights, 4)
    assert len(original) == len(weights)
    assert not any(part in name for name in original for part in ("resnets", "blocks", "to_q", "samplers", "attentions"))
    assert original["encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    back = weights_to_diffusers(original, 4)
    assert {name: w.shape for name, w in back.items()} == {name: w.shape for name, w in weights.items()}
