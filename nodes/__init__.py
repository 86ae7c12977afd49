"""The nodes, by what they do.  Each file holds schemas and a few lines from host values to the core and back.

``load``    TSDSRLoadLora, TSDSRLoadPrompt, TSDSRLoadCheckpoint      ``save``      TSDSRSaveCheckpoint
``sample``  TSDSROneStep, TSDSRSampler                               ``vae``       TSDSREncode, TSDSRDecode
``colour``  TSDSRColorFix                                            ``upscale``   TSDSRUpscale
``host``    everything that touches ComfyUI's insides
``inputs``  inputs that several nodes share                          ``checks``    of inputs, before any work
``report``  what a node shows after a run                            ``types``     of what the host hands over
"""

from comfy_api.latest import ComfyExtension, io

from .colour import ColorFix
from .host.files import register_folder
from .host.schema import warn_of_another_copy
from .host.templates import copy_examples, sort_templates
from .load import LoadCheckpoint, LoadLora, LoadPrompt
from .sample import OneStep, OneStepSamplerNode
from .save import SaveCheckpoint
from .upscale import Upscale
from .vae import Decode, Encode

NODES: list[type[io.ComfyNode]] = [
    Upscale,
    LoadCheckpoint,
    LoadLora,
    LoadPrompt,
    Encode,
    OneStep,
    Decode,
    ColorFix,
    OneStepSamplerNode,
    SaveCheckpoint,
]


class Extension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes."""
        warn_of_another_copy(Upscale)
        register_folder()
        copy_examples()
        sort_templates()
        return NODES


async def comfy_entrypoint() -> Extension:
    """Called by ComfyUI once, at start."""
    return Extension()
