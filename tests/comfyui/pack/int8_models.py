"""int8 models in the real host, on a machine without the GPU that the pack would ask for."""

import contextlib
import json
import sys
from unittest.mock import patch

import comfy.model_management
import comfy.quant_ops
import torch

NAME = "int8_tensorwise"


def pack_layers(model):
    """The pack's module ``nodes.host.layers``, and what builds the MODEL again."""
    build, arguments = model.cached_patcher_init
    return sys.modules[build.__module__].layers, lambda: build(*arguments)


class Int8Products:
    """A model of an int8 bundle as it is where products in int8 are fast."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, model):
        layers, build = pack_layers(model)
        with patch.object(layers, "multiplies_int8", lambda device: True):
            return (build(),)


class Velocity:
    """Says what a model makes of fixed latents: its velocity at ``t = 1000``, 1024 numbers."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "conditioning": ("CONDITIONING",)}})
    RETURN_TYPES = ()
    FUNCTION = "say"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def say(self, model, conditioning):
        comfy.model_management.load_models_gpu([model])
        tokens, more = conditioning[0]
        z = torch.sin(torch.arange(1024.0)).reshape(1, 16, 8, 8)
        with torch.inference_mode():
            v = model.model.diffusion_model(z, torch.tensor([1000.0]), context=tokens, y=more["pooled_output"])
        return {"ui": {"text": [json.dumps(v.flatten().tolist())]}}


class Gpu(str):
    """The CPU under another name."""

    type = "cuda"


class MultipliesInt8:
    """Says when the pack gives the host int8 weights: by what the host knows, what the device is and what products show."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES = ()
    FUNCTION = "say"
    OUTPUT_NODE = True
    CATEGORY = "test"

    def say(self, model):
        layers, _ = pack_layers(model)
        fast = lambda value: patch.object(comfy.quant_ops.TensorWiseINT8Layout, "supports_fast_matmul", lambda: value)  # noqa: E731
        linear = torch.nn.functional.linear

        def fail(*args):
            raise RuntimeError("no kernel")

        found = {
            "CPU": layers.multiplies_int8(torch.device("cpu")),
            "host without int8": self.told(layers, patch.dict(comfy.quant_ops.QUANT_ALGOS, clear=True)),
        }
        if NAME in comfy.quant_ops.QUANT_ALGOS:
            product = lambda made: patch.object(torch.nn.functional, "linear", made)  # noqa: E731
            found |= {
                "fast": self.told(layers, fast(True)),
                "slow": self.told(layers, fast(False)),
                "failing": self.told(layers, fast(True), product(fail)),
                "wrong": self.told(layers, fast(True), product(lambda *args: 2 * linear(*args))),
            }
        return {"ui": {"text": [json.dumps(found)]}}

    def told(self, layers, *patches):
        with contextlib.ExitStack() as stack:
            for each in patches:
                stack.enter_context(each)
            return layers.multiplies_int8(Gpu("cpu"))
