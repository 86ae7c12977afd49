import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from tsdsr_core.families.sd3.config import VAE_CONFIG
from tsdsr_core.vae.program import Attention, KeyValue, Replaced, decoder_program, encoder_program
from tsdsr_core.weights.vae_keys import weights_to_original

SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 64, 64, 64), "layers_per_block": 2, "latent_channels": 16, "norm_num_groups": 32,
}  # fmt: skip


def small_vae(groups: int = 8, seed: int = 0, **changes) -> AutoencoderKL:
    """SD3's autoencoder in small, with quantising convolutions, random weights and norms that do something."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**SMALL | {"norm_num_groups": groups} | changes).eval().requires_grad_(False)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
    return vae


def resnet(ins: int, outs: int) -> nn.Module:
    block = nn.Module()
    block.norm1, block.conv1 = nn.GroupNorm(32, ins, 1e-6), nn.Conv2d(ins, outs, 3, padding=1)
    block.norm2, block.conv2 = nn.GroupNorm(32, outs, 1e-6), nn.Conv2d(outs, outs, 3, padding=1)
    block.swish, block.dropout = nn.SiLU(inplace=True), nn.Dropout(0.0)
    if ins != outs:
        block.nin_shortcut = nn.Conv2d(ins, outs, 1)
    return block


def half_of(widths: list[int], last: int, decoder: bool) -> nn.Module:
    """An encoder or decoder of ``SMALL`` in the original layout, as a host builds it: parts and their names, no forward."""
    root, top, levels = nn.Module(), widths[-1], len(widths)
    root.conv_in = nn.Conv2d(16, top, 3, padding=1) if decoder else nn.Conv2d(3, widths[0], 3, padding=1)
    root.mid = nn.Module()
    root.mid.block_1, root.mid.block_2, root.mid.attn_1 = resnet(top, top), resnet(top, top), nn.Module()
    root.mid.attn_1.norm = nn.GroupNorm(32, top, 1e-6)
    for name in ("q", "k", "v", "proj_out"):
        root.mid.attn_1.add_module(name, nn.Conv2d(top, top, 1))
    built = []
    before = top if decoder else widths[0]
    for index in reversed(range(levels)) if decoder else range(levels):
        level, width = nn.Module(), widths[index]
        level.block = nn.ModuleList([resnet(before if i == 0 else width, width) for i in range(3 if decoder else 2)])
        level.attn = nn.ModuleList()
        if decoder and index > 0:
            level.upsample = nn.Module()
            level.upsample.conv, level.upsample.scale_factor = nn.Conv2d(width, width, 3, padding=1), 2.0
        if not decoder and index < levels - 1:
            level.downsample = nn.Module()
            level.downsample.conv = nn.Conv2d(width, width, 3, stride=2)
        built, before = [level, *built] if decoder else [*built, level], width
    root.add_module("up" if decoder else "down", nn.ModuleList(built))
    end = widths[0] if decoder else top
    root.norm_out, root.conv_out = nn.GroupNorm(32, end, 1e-6), nn.Conv2d(end, last, 3, padding=1)
    return root


def original_vae(vae: AutoencoderKL) -> nn.Module:
    """``vae``, of 32 norm groups, in the original layout."""
    widths = list(SMALL["block_out_channels"])
    original = nn.Module()
    original.encoder, original.decoder = half_of(widths, 32, False), half_of(widths, 3, True)
    original.quant_conv, original.post_quant_conv = nn.Conv2d(32, 32, 1), nn.Conv2d(16, 16, 1)
    original.load_state_dict(weights_to_original(vae.state_dict(), len(widths)))
    return original.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sd3():
    with torch.device("meta"):
        return AutoencoderKL(**VAE_CONFIG)


def test_every_weight_of_sd3_has_its_place(sd3):
    held = set()
    for op in (*decoder_program(sd3), *encoder_program(sd3)):
        for module in vars(op).values():
            if isinstance(module, nn.Module):
                held |= {id(p) for p in module.parameters()}
    assert held == {id(p) for p in sd3.parameters()}


def test_the_decoder_of_sd3_in_passes(sd3):
    ops = decoder_program(sd3)
    assert [op.spec.kind for op in ops] == (
        ["conv", "residual_start", "residual_end", "keys", "attention", "residual_start", "residual_end"]
        + (["residual_start", "residual_end"] * 3 + ["conv"]) * 4
    )
    assert [op.name for op in ops[:3]] == [
        "decoder.conv_in", "decoder.mid_block.resnets.0.conv1", "decoder.mid_block.resnets.0.conv2",
    ]  # fmt: skip
    assert sum(op.spec.rescale == "up" for op in ops) == 3
    assert [op.spec.residual_channels for op in ops if op.spec.residual_channels not in (0, op.spec.out_channels)] == [
        512,
        256,
    ], "two shortcuts"
    unmeasured = [op.name for op in ops if not op.spec.measured]
    assert unmeasured == [
        "decoder.mid_block.attentions.0", "decoder.up_blocks.0.resnets.2.conv2", "decoder.up_blocks.1.resnets.2.conv2",
        "decoder.up_blocks.2.resnets.2.conv2", "decoder.conv_out",
    ], "keys, what goes into an upsampling, and the result"  # fmt: skip


def test_the_encoder_of_sd3_in_passes(sd3):
    ops = encoder_program(sd3)
    assert [op.spec.kind for op in ops] == (
        ["conv"]
        + (["residual_start", "residual_end"] * 2 + ["conv"]) * 3
        + ["residual_start", "residual_end"] * 3
        + ["keys", "attention", "residual_start", "residual_end", "conv"]
    )
    assert [op.spec.rescale for op in ops if op.spec.kind == "conv"] == ["same", "down", "down", "down", "same"]
    assert (ops[0].spec.in_channels, ops[-1].spec.out_channels) == (3, 32)


def test_both_layouts_give_the_same_passes():
    vae = small_vae(32)
    original = original_vae(vae)
    for program in (decoder_program, encoder_program):
        ours, theirs = program(vae), program(original)
        assert [op.spec for op in ours] == [op.spec for op in theirs]
        for one, other in zip(ours, theirs, strict=True):
            for key, module in vars(one).items():
                if isinstance(module, nn.Module):
                    assert module.weight.flatten().equal(getattr(other, key).weight.flatten())


def test_quantising_convolutions_come_first_and_last():
    vae = small_vae()
    first, last = decoder_program(vae)[0], encoder_program(vae)[-1]
    assert (first.module, first.spec.halo) == (vae.post_quant_conv, 0)
    assert (last.module, last.spec.halo) == (vae.quant_conv, 0)


def test_attention_that_adds_nothing_is_left_out():
    vae = small_vae()
    count = len(decoder_program(vae))
    out = vae.decoder.mid_block.attentions[0].to_out[0]
    out.weight.zero_()
    assert len(decoder_program(vae)) == count, "the bias still counts"
    out.bias.zero_()
    assert not any(isinstance(op, KeyValue | Attention) for op in decoder_program(vae))
    assert len(decoder_program(vae, patched=True)) == count, "a host may patch it when it loads it"
    out.weight_function = [lambda weight: weight + 1]  # a host patches it while it runs
    assert len(decoder_program(vae)) == count


def test_a_residual_block_that_adds_nothing_is_left_out():
    vae = small_vae()
    count, block = len(decoder_program(vae)), vae.decoder.up_blocks[0].resnets[1]
    block.conv2.weight.zero_()
    assert len(decoder_program(vae)) == count, "the bias still counts"
    block.conv2.bias.zero_()
    assert not [op.name for op in decoder_program(vae) if op.name.startswith("decoder.up_blocks.0.resnets.1.")]
    assert len(decoder_program(vae, patched=True)) == count, "a host may patch it when it loads it"


def test_a_residual_block_with_a_shortcut_is_never_left_out():
    vae = small_vae()
    count = len(decoder_program(vae))
    block = next(block for level in vae.decoder.up_blocks for block in level.resnets if block.conv_shortcut is not None)
    block.conv2.weight.zero_()
    block.conv2.bias.zero_()
    assert len(decoder_program(vae)) == count


def test_an_autoencoder_without_attention():
    vae = small_vae(mid_block_add_attention=False)
    assert not any(isinstance(op, KeyValue | Attention) for op in (*decoder_program(vae), *encoder_program(vae)))


def test_nothing_is_changed():
    vae = small_vae()
    before = {name: dict(vars(module)) for name, module in vae.named_modules()}
    decoder_program(vae)
    encoder_program(vae)
    assert {name: dict(vars(module)) for name, module in vae.named_modules()} == before


def compiled(vae: nn.Module, *paths: str) -> nn.Module:
    """``vae`` with parts as ``torch.compile`` gives them."""
    for path in paths:
        owner, _, name = path.rpartition(".")
        setattr(vae.get_submodule(owner), name, torch.compile(vae.get_submodule(path)))
    return vae


@pytest.mark.parametrize(
    "paths",
    [
        ("encoder", "decoder"),
        ("decoder.mid_block", "decoder.up_blocks.1", "decoder.up_blocks.2.resnets.0", "decoder.conv_in", "decoder.conv_act"),
        ("decoder.up_blocks.0.resnets.1.norm1", "decoder.up_blocks.0.resnets.1.nonlinearity", "post_quant_conv", "decoder"),
    ],
)
def test_compiled_parts_are_what_they_were(paths):
    """The same passes with the same modules, none of which is compiled; what is loaded is left compiled."""
    vae = small_vae()
    expected = [decoder_program(vae), encoder_program(vae)]
    found = [decoder_program(compiled(vae, *paths)), encoder_program(vae)]
    for before, after in zip(expected, found, strict=True):
        assert [vars(op) for op in before] == [vars(op) for op in after]
    for path in paths[-1:]:
        assert type(vae.get_submodule(path)).__name__ == "OptimizedModule"


def test_a_compiled_autoencoder_is_what_it_was():
    vae = small_vae()
    assert [vars(op) for op in decoder_program(torch.compile(vae))] == [vars(op) for op in decoder_program(vae)]


def change(path: str, value):
    def apply(vae):
        owner, _, name = path.rpartition(".")
        setattr(vae.get_submodule(owner), name, value)

    return apply


@pytest.mark.parametrize(
    ("half", "apply", "named"),
    [
        ("decoder", change("decoder.conv_in", nn.Conv3d(16, 64, 3, padding=1)), r"decoder\.conv_in \(Conv3d\)"),
        ("decoder", change("decoder.conv_out", nn.Conv2d(32, 3, 5, padding=2)), r"decoder\.conv_out .*\(5, 5\)"),
        ("decoder", change("decoder.conv_out", nn.Conv2d(32, 3, 3, padding=1, padding_mode="reflect")), "reflect"),
        ("decoder", change("decoder.conv_norm_out", nn.BatchNorm2d(32)), r"decoder\.conv_norm_out \(BatchNorm2d\)"),
        ("decoder", change("decoder.conv_act", nn.GELU()), r"decoder\.conv_act \(GELU\)"),
        ("decoder", change("decoder.up_blocks.1.extra", nn.Conv2d(1, 1, 1)), r"decoder\.up_blocks\.1\.extra"),
        ("decoder", change("decoder.up_blocks.1.resnets.0.time_emb_proj", nn.Linear(1, 1)), r"resnets\.0\.time_emb_proj"),
        ("decoder", change("decoder.up_blocks.1.resnets.0.output_scale_factor", 2.0), "output_scale_factor is 2.0"),
        ("decoder", change("decoder.up_blocks.1.upsamplers.0.conv", None), r"upsamplers\.0\.conv: it is missing"),
        ("decoder", change("decoder.up_blocks.1.upsamplers.0.use_conv_transpose", True), "use_conv_transpose is True"),
        ("decoder", change("decoder.mid_block.attentions.0.heads", 2), r"mid_block\.attentions\.0 .*heads is 2"),
        ("decoder", change("decoder.mid_block.attentions.0.norm_q", nn.LayerNorm(64)), r"attentions\.0\.norm_q"),
        (
            "encoder",
            change("encoder.down_blocks.0.downsamplers.0.conv", nn.AvgPool2d(2)),
            r"downsamplers\.0\.conv \(AvgPool2d\)",
        ),
        ("encoder", change("encoder.mid_block.resnets", nn.ModuleList()), r"encoder\.mid_block\.resnets"),
        ("encoder", change("encoder.down_blocks", None), r"encoder\.down_blocks: it is missing"),
        ("encoder", change("bn", nn.BatchNorm2d(4)), r"the autoencoder\.bn \(BatchNorm2d\)"),
        ("encoder", change("encoder", nn.Sequential(nn.Conv2d(3, 3, 3))), r"encoder \(Sequential\)"),
        ("encoder", change("encoder", None), r"the autoencoder\.encoder: it is missing"),
    ],
)
def test_what_is_not_understood_is_named(half, apply, named):
    vae = small_vae()
    apply(vae)
    with pytest.raises(ValueError, match=f"the tiled VAE does not support .*{named}"):
        (decoder_program if half == "decoder" else encoder_program)(vae)


def circular(conv: nn.Conv2d, mode: str = "circular"):
    """As nodes for seamless tiling do it: a method of one layer, which is plain again with ``mode`` "constant"."""
    width = conv.padding[0]

    def forward(self, x, weight, bias):
        return F.conv2d(F.pad(x, (width,) * 4, mode=mode), weight, bias, self.stride)

    conv._conv_forward = forward.__get__(conv)


def outside(conv: nn.Conv2d):
    conv._conv_forward = lambda x, weight: x


REPLACED = {
    "a circular convolution": ("decoder.up_blocks.1.resnets.0.conv1", circular, "conv1: its _conv_forward was replaced"),
    "one that takes something else": ("decoder.conv_out", outside, "conv_out: its _conv_forward was replaced"),
    "circular padding": ("encoder.conv_in", lambda conv: setattr(conv, "padding_mode", "circular"), "its padding is circular"),
    "a block": ("decoder.up_blocks.0.resnets.1", lambda block: setattr(block, "forward", lambda x: x), "its forward was"),
    "a norm": ("encoder.conv_norm_out", lambda norm: setattr(norm, "forward", lambda x: x), "conv_norm_out: its forward was"),
    "a projection": ("decoder.mid_block.attentions.0.to_q", lambda layer: setattr(layer, "forward", abs), "to_q: its forward"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_method_is_named(name):
    vae = small_vae()
    path, replace, message = REPLACED[name]
    replace(vae.get_submodule(path))
    program = decoder_program if path.startswith("decoder") else encoder_program
    with pytest.raises(Replaced, match=f"the tiled VAE does not support .*{message}"):
        program(vae)


@pytest.mark.parametrize(
    "undo",
    [
        lambda conv: circular(conv, "constant"),
        lambda conv: setattr(conv, "_conv_forward", nn.Conv2d._conv_forward.__get__(conv)),
        lambda conv: setattr(conv, "forward", torch.compile(conv.forward)),
    ],
)
def test_a_method_that_does_the_same_is_none(undo):
    vae, plain = small_vae(), small_vae()
    for conv in vae.modules():
        if isinstance(conv, nn.Conv2d):
            undo(conv)
    assert len(decoder_program(vae)) == len(decoder_program(plain))
    assert len(encoder_program(vae)) == len(encoder_program(plain))


def test_other_objects_are_refused():
    with pytest.raises(ValueError, match="does not support the autoencoder"):
        decoder_program(object())
