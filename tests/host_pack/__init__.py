"""A second node pack that the tests put into the real host: what no stock node gives them."""

import copy

import torch


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


class LittleMemory:
    """A model that runs out of memory above so many latent cells at once."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "cells": ("INT", {"default": 1, "max": 10**9})}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, model, cells):
        def run(apply_model, arguments):
            x = arguments["input"]
            if x.shape[0] * x.shape[2] * x.shape[3] > cells:
                raise torch.OutOfMemoryError(f"{tuple(x.shape)}")
            return apply_model(x, arguments["timestep"], **arguments["c"])

        patched = model.clone()
        patched.set_model_unet_function_wrapper(run)
        return (patched,)


class LittleVae:
    """A VAE that would need more memory than there is, untiled."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"vae": ("VAE",)}})
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, vae):
        little = copy.copy(vae)
        little.memory_used_encode = lambda shape, dtype: 1e6 if shape[2] * shape[3] <= 512 * 512 else 1e18
        little.memory_used_decode = lambda shape, dtype: 1e6 if shape[2] * shape[3] <= 128 * 128 else 1e18
        return (little,)


class Prompt:
    """Conditioning with and without what SD3 needs."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"kind": (["no pooled output", "area", "nothing"],)}})
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, kind):
        tokens, pooled = torch.zeros(1, 8, 64), torch.zeros(1, 64)
        return (
            {
                "no pooled output": [[tokens, {}]],
                "nothing": [],
                "area": [[tokens, {"pooled_output": pooled, "area": (8, 8, 0, 0)}]],
            }[kind],
        )


NODE_CLASS_MAPPINGS = {
    "TestLittleVae": LittleVae,
    "TestOddImage": OddImage,
    "TestOddLatent": OddLatent,
    "TestLittleMemory": LittleMemory,
    "TestPrompt": Prompt,
}
