"""Progress, interruption and out-of-memory errors."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ...tsdsr_core.system.memory import ImageDevice, is_out_of_memory
from ..types import Patcher


class NodeProgress:
    """One progress bar for all stages of a node; also notices that the user pressed Cancel.

    ``update`` has the name and meaning of the host's ``ProgressBar.update``, so that host functions can drive it.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._bar = comfy.utils.ProgressBar(total)

    def update(self, count: int, preview: Any = None) -> None:
        """Count ``count`` finished units; ``preview`` is what the host's previewer made.

        Raises:
            comfy.model_management.InterruptProcessingException: after Cancel.
        """
        check_interrupted()
        self.done = min(self.total, self.done + count)
        self._bar.update_absolute(self.done, self.total, preview)


def show_text(node: Any, text: str) -> None:
    """Show ``text`` on a running node of a class that asks for ``io.Hidden.unique_id``; its last one belongs to its result.

    By a message of our own, which ``web/report.js`` shows: scripts take the host's, which is binary, for a picture.
    """
    name = getattr(node.hidden, "unique_id", None)
    if name is not None:
        from server import PromptServer  # the host's, which only a running server has

        client = PromptServer.instance.client_id
        if client is not None:
            PromptServer.instance.send_sync("tsdsr.text", {"node": name, "text": text}, client)


def results_device() -> torch.device:
    """Where images are kept between nodes."""
    return comfy.model_management.intermediate_device()


def image_device(patcher: Patcher | None = None) -> ImageDevice:
    """Where images are resized and colour-corrected: beside the model of ``patcher``, or without one where the host computes.

    On the CPU if free memory is unknown.
    """
    device = comfy.model_management.get_torch_device() if patcher is None else patcher.load_device
    if device.type == "cpu" or comfy.model_management.directml_enabled:
        return ImageDevice(torch.device("cpu"))
    free = comfy.model_management.get_free_memory
    return ImageDevice(
        device, lambda: int(free(device)) if patcher is None else free_memory(patcher), release_memory, ran_out
    )  # fmt: skip


def check_interrupted() -> None:
    """Raise the host's exception if the user pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def free_memory(patcher: Patcher) -> int | None:
    """Bytes that activations may take on the device of a model, with what the host would take from its weights for them.

    None where there is no telling: on the CPU, and with DirectML, for which the host has a made-up figure.
    """
    device = patcher.load_device
    if device.type == "cpu" or comfy.model_management.directml_enabled:
        return None
    own = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)  # newer hosts: with dynamic VRAM
    return int(own(device))


def free_ram(wanted: int) -> int:
    """Bytes of host memory that can be had; where those are fewer than ``wanted``, the host first gives back what it can.

    That is what it keeps of earlier results, and of weights in pinned memory.
    """
    cpu = torch.device("cpu")
    free = comfy.model_management.get_free_memory(cpu)
    if free < wanted:
        cached = getattr(getattr(comfy, "memory_management", None), "extra_ram_release", None)  # newer hosts
        pinned = getattr(comfy.model_management, "free_pins", None)  # newer hosts
        release_memory()
        if cached is not None:
            cached(wanted)
        if pinned is not None:
            pinned(wanted - comfy.model_management.get_free_memory(cpu))
        free = comfy.model_management.get_free_memory(cpu)
    return int(free)


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, to the host or to us."""
    own = getattr(comfy.model_management, "is_oom", None)  # newer hosts
    known = isinstance(error, comfy.model_management.OOM_EXCEPTION) if own is None else own(error)
    return known or is_out_of_memory(error)


def release_memory() -> None:
    """Give cached device memory back, after running out."""
    discard = getattr(comfy.model_management, "discard_cuda_async_error", None)  # newer hosts
    if discard is not None and torch.cuda.is_available():
        discard()
    comfy.model_management.soft_empty_cache()
