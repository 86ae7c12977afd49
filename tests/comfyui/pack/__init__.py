"""A second node pack that the tests put into the real host: what no stock node gives them."""

import copy
import gc
import json
import logging

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import latent_preview
import torch

from .bad_values import BadValues, Disc, Text, Value
from .int8_models import Int8Products, MultipliesInt8, Velocity


class OddImage:
    """Images that other nodes may hand over by mistake."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"kind": (["nan", "empty batch", "grey", "one pixel", "text"],)}})
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, kind):
        image = torch.full((1, 8, 8, 3), 0.5)
        if kind == "nan":
            image[0, 3, 3, 1] = torch.nan
        return (
            {"nan": image, "empty batch": image[:0], "grey": image[..., :1], "one pixel": image[:, :1, :1], "text": image[0]}[
                kind
            ],
        )


class OddLatent:
    """Latents of other models."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"channels": ("INT", {"default": 4})}})
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, channels):
        return ({"samples": torch.randn(1, channels, 9, 7, generator=torch.Generator().manual_seed(0))},)


MASKS = {
    "nan": torch.full((1, 8, 8), torch.nan), "bool": torch.ones(1, 8, 8, dtype=torch.bool), "empty": torch.ones(1, 0, 8),
    "whole numbers": torch.ones(1, 8, 8, dtype=torch.int64), "text": "x", "5": torch.full((1, 8, 8), 5.0),
    "-5": torch.full((1, 8, 8), -5.0),
}  # fmt: skip


class OddMask:
    """A latent with a noise mask that other nodes may make by mistake."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"latent": ("LATENT",), "kind": (list(MASKS),)}})
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, latent, kind):
        return ({**latent, "noise_mask": MASKS[kind]},)


class Wrapped:
    """A model that says when it runs, and runs out of memory above so many latent cells at once."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"model": ("MODEL",), "cells": ("INT", {"default": 1, "max": 10**9}), "log": ("STRING", {})}}
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, model, cells, log):
        def run(apply_model, arguments):
            x = arguments["input"]
            if log:
                logging.info(log)
            if x.shape[0] * x.shape[2] * x.shape[3] > cells:
                raise torch.OutOfMemoryError(f"{tuple(x.shape)}")
            return apply_model(x, arguments["timestep"], **arguments["c"])

        patched = model.clone()
        patched.set_model_unet_function_wrapper(run)
        return (patched,)


class SmallModel:
    """A model that runs at the size of the result, not at SD3's least of 512 pixels, which take a minute of a CPU."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, model):
        patched = model.clone()
        patched.set_attachments("tsdsr_defaults", {"process_size": 0})
        return (patched,)


class Packed(torch.Tensor):
    """Bytes that stand for numbers, as the packs for GGUF files keep weights."""


class PackedModel:
    """A model of a checkpoint of this pack with a weight that another pack quantised."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"model": ("MODEL",), "kind": (["its own class", "bytes", "more in its state dict"],)}}
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, model, kind):
        build, arguments = model.cached_patcher_init
        made = build(*arguments)
        layer = made.model.diffusion_model.x_embedder.proj
        if kind == "more in its state dict":
            layer._register_state_dict_hook(lambda layer, found, prefix, local: found.update({f"{prefix}temp.weight": None}))
        stored = torch.zeros(layer.weight.shape, dtype=torch.uint8)
        layer.weight = torch.nn.Parameter(stored if kind == "bytes" else stored.as_subclass(Packed), requires_grad=False)
        return (made,)


class OtherModel:
    """A model and a VAE of other families."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES = ("MODEL", "VAE")
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self):
        config = comfy.supported_models.SD15(
            {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1],
             "channel_mult": [1], "transformer_depth": [0], "transformer_depth_output": [0, 0], "transformer_depth_middle": 0,
             "num_heads": 8, "use_spatial_transformer": True, "context_dim": 32}
        )  # fmt: skip
        cpu = torch.device("cpu")
        model = comfy.model_patcher.ModelPatcher(comfy.model_base.BaseModel(config, device=cpu), cpu, cpu)
        tiny = comfy.taesd.taesd.TAESD(latent_channels=4).state_dict()
        return model, comfy.sd.VAE(sd=tiny)


class CoarseVae:
    """The VAE in bf16, as ComfyUI takes it on many GPUs."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"vae": ("VAE",)}})
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, vae):
        return (comfy.sd.VAE(sd=vae.first_stage_model.state_dict(), dtype=torch.bfloat16),)


class CompiledVae:
    """The VAE with compiled halves, as custom nodes make it; nothing is compiled before it runs."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"vae": ("VAE",)}})
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, vae):
        made = comfy.sd.VAE(sd=vae.first_stage_model.state_dict(), dtype=vae.vae_dtype)
        module = made.first_stage_model
        module.encoder, module.decoder = torch.compile(module.encoder), torch.compile(module.decoder)
        return (made,)


class FusedNorm(torch.nn.Module):
    """A norm and SiLU in one, with the norm's weights, as packs for faster kernels put it into a VAE."""

    def __init__(self, norm, silu):
        super().__init__()
        self.weight, self.bias, self.groups, self.eps, self.silu = norm.weight, norm.bias, norm.num_groups, norm.eps, silu

    def forward(self, x):
        x = torch.nn.functional.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        return torch.nn.functional.silu(x) if self.silu else x


def circular(conv, x, weight, bias):
    sides = conv._reversed_padding_repeated_twice
    return torch.nn.functional.conv2d(torch.nn.functional.pad(x, sides, mode=conv.seamless), weight, bias, conv.stride)


class ReplacedVae:
    """The VAE after another pack: parts for its copy alone, methods of its layers, or one of its own replaced."""

    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {
                "vae": ("VAE",),
                "kind": (
                    ["norms", "compiled", "methods", "methods, off", "padding mode", "method of the VAE", "parts of a block"],
                ),
            }
        }
    )
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, vae, kind):
        made = copy.copy(vae)
        if kind == "method of the VAE":
            made.decode = lambda *args, **kwargs: vae.decode(*args, **kwargs)
            return (made,)
        if kind in ("norms", "compiled", "parts of a block"):
            made.patcher = vae.patcher.clone()
            patches = self.norms(made.first_stage_model) if kind == "norms" else {}
            if kind == "compiled":
                patches = {name: torch.compile(getattr(made.first_stage_model, name)) for name in ("encoder", "decoder")}
            if kind == "parts of a block":
                patches = {"decoder.conv_out": copy.deepcopy(made.first_stage_model.decoder.conv_out)}
            for name, part in patches.items():
                made.patcher.add_object_patch(name, part)
            return (made,)
        made.first_stage_model = copy.deepcopy(vae.first_stage_model)
        made.patcher = comfy.model_patcher.ModelPatcher(
            made.first_stage_model, vae.patcher.load_device, vae.patcher.offload_device
        )
        for layer in made.first_stage_model.modules():
            if isinstance(layer, torch.nn.Conv2d) and kind == "padding mode":
                layer.padding_mode = "circular"
            elif isinstance(layer, torch.nn.Conv2d):
                layer.seamless = "constant" if kind == "methods, off" else "circular"
                layer._conv_forward = circular.__get__(layer)
        return (made,)

    def norms(self, model):
        found = {}
        for name, part in model.named_modules():
            if name.endswith((".norm1", ".norm2", ".norm_out")):
                found[name] = FusedNorm(part, not name.endswith(".norm_out"))
            elif name.endswith(".swish"):
                found[name] = torch.nn.Identity()
        return found


class DefaultDtype:
    """Sets torch's default number type from now on, as some packs do and forget; passes on what was loaded before."""

    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {"dtype": (["bfloat16", "float16", "float32"],)},
            "optional": {"model": ("MODEL",), "vae": ("VAE",)},
        }
    )
    RETURN_TYPES = ("MODEL", "VAE")
    FUNCTION = "set"
    OUTPUT_NODE = True
    CATEGORY = "test"
    IS_CHANGED = classmethod(lambda cls, dtype: float("nan"))

    def set(self, dtype, model=None, vae=None):
        torch.set_default_dtype(getattr(torch, dtype))
        return (model, vae)


class LatentDtype:
    """A latent in another number type, as some nodes hand it on; back in fp32 after ``rounded``."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"latent": ("LATENT",), "kind": (["bfloat16", "float16", "float64", "rounded"],)}}
    )
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, latent, kind):
        samples = latent["samples"]
        made = samples.bfloat16().float() if kind == "rounded" else samples.to(getattr(torch, kind))
        return ({**latent, "samples": made},)


class Change:
    """Says by how much the columns of two latents differ at least and at most."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"one": ("LATENT",), "other": ("LATENT",)}})
    RETURN_TYPES = ()
    FUNCTION = "say"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def say(self, one, other):
        change = (one["samples"] - other["samples"]).abs().amax((0, 1))
        return {"ui": {"text": [json.dumps([change.amin(0).tolist(), change.amax(0).tolist()])]}}


class TypeOfVae:
    """Says what type a VAE has."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"vae": ("VAE",)}})
    RETURN_TYPES = ()
    FUNCTION = "say"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def say(self, vae):
        return {"ui": {"text": [str(vae.vae_dtype)]}}


class Difference:
    """Says by how much two batches of images differ at most, before anything is rounded to 8 bits."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"one": ("IMAGE",), "other": ("IMAGE",)}})
    RETURN_TYPES = ()
    FUNCTION = "say"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def say(self, one, other):
        assert one.shape == other.shape
        return {"ui": {"text": [str((one - other).abs().max().item())]}}


class Weights:
    """Says how many bytes a model takes by the host's count, and of which types its weights are."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES = ()
    FUNCTION = "say"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def say(self, model):
        found = {"size": model.model_size()}
        for weight in model.model.state_dict().values():
            weight = getattr(weight, "_qdata", weight)  # what a quantised tensor stores
            found[str(weight.dtype)] = found.get(str(weight.dtype), 0) + weight.numel() * weight.element_size()
        return {"ui": {"text": [json.dumps(found)]}}


class Rebuilt:
    """A model as newer hosts build it a second time, on a device that can hold 8-bit numbers or cannot."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "eight_bit": ("BOOLEAN", {"default": True})}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, model, eight_bit):
        build, arguments = model.cached_patcher_init
        real = comfy.model_management.supports_cast
        comfy.model_management.supports_cast = lambda device, dtype: eight_bit
        try:
            return (build(*arguments),)
        finally:
            comfy.model_management.supports_cast = real


class Census:
    """Counts what the process holds: tensors, their bytes and loaded models."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"seed": ("INT", {"default": 0, "max": 2**31})}})
    RETURN_TYPES = ()
    FUNCTION = "count"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def count(self, seed):
        gc.collect()
        tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
        counts = {
            "tensors": len(tensors),
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            "models": len(comfy.model_management.current_loaded_models),
        }
        return {"ui": {"text": [json.dumps(counts)]}}


class SwitchedVae:
    """The VAE after ``torch.compile`` of its halves, in place as other packs do it, or as it was before."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"vae": ("VAE",), "compiled": ("BOOLEAN", {"default": True})}})
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, vae, compiled):
        for name in ("encoder", "decoder"):
            half = getattr(vae.first_stage_model, name)
            half = getattr(half, "_orig_mod", half)
            setattr(vae.first_stage_model, name, torch.compile(half) if compiled else half)
        return (vae,)


class Previews:
    """Makes previewers fail from now on, or work again; passes on what it gets."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "fail": ("BOOLEAN", {"default": False})}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "set"
    CATEGORY = "test"
    fail = False

    def set(self, model, fail):
        Previews.fail = fail
        return (model,)


class LoggedPreviewer(latent_preview.LatentPreviewer):
    """Says how much it decodes, of the first image as previewers do."""

    def __init__(self, previewer):
        self.previewer = previewer

    def decode_latent_to_preview_image(self, preview_format, x0):
        logging.info("preview of %s", tuple(x0[:1].shape))
        if Previews.fail:
            raise torch.OutOfMemoryError("no memory for a preview")
        return self.previewer.decode_latent_to_preview_image(preview_format, x0)


class FreeMemory:
    """Lets the host have so much free memory from now on, or what there is; passes on what it gets."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"image": ("IMAGE",), "megabytes": ("INT", {"default": 0, "max": 10**9})}}
    )
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "set"
    CATEGORY = "test"
    real = staticmethod(comfy.model_management.get_free_memory)

    def set(self, image, megabytes):
        few = lambda dev=None, torch_free_too=False: (megabytes * 1e6,) * 2 if torch_free_too else megabytes * 1e6  # noqa: E731
        comfy.model_management.get_free_memory = few if megabytes else self.real
        return (image,)


_get_previewer = latent_preview.get_previewer
latent_preview.get_previewer = lambda *args: LoggedPreviewer(_get_previewer(*args))
_patch_weight = comfy.model_patcher.ModelPatcher.patch_weight_to_device
_estimate = comfy.sampler_helpers.estimate_memory


def say_patch(self, key, *args, **kwargs):
    if key in self.patches:
        logging.info("patching %s", key)
    return _patch_weight(self, key, *args, **kwargs)


def say_estimate(model, noise_shape, *args, **kwargs):
    logging.info("asked for memory for %s", tuple(noise_shape))
    return _estimate(model, noise_shape, *args, **kwargs)


comfy.model_patcher.ModelPatcher.patch_weight_to_device = say_patch
comfy.sampler_helpers.estimate_memory = say_estimate


class Prompt:
    """Conditioning with and without what SD3 needs."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"kind": (["no pooled output", "area", "nothing", "zeros"],)}})
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, kind):
        tokens, pooled = torch.zeros(1, 8, 64), torch.zeros(1, 64)
        return (
            {
                "no pooled output": [[tokens, {}]],
                "nothing": [],
                "zeros": [[tokens, {"pooled_output": pooled}]],
                "area": [[tokens, {"pooled_output": pooled, "area": (8, 8, 0, 0)}]],
            }[kind],
        )


_NODES = (
    OddImage, OddLatent, OddMask, Wrapped, SmallModel, OtherModel, CoarseVae, CompiledVae, TypeOfVae, Difference, Weights,
    Rebuilt, Int8Products, MultipliesInt8, Velocity, Census, Prompt, BadValues, Text, Value, Disc, SwitchedVae, Previews,
    FreeMemory, PackedModel, ReplacedVae, DefaultDtype, LatentDtype, Change,
)  # fmt: skip
NODE_CLASS_MAPPINGS = {f"Test{node.__name__}": node for node in _NODES}
"""Ids that are no literals: directories of nodes read the source and would take them for nodes of the pack."""
