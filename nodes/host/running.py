"""Progress, interruption and running out of memory."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch


class Progress:
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


def results_device() -> torch.device:
    """Where pictures lie between nodes."""
    return comfy.model_management.intermediate_device()


def check_interrupted() -> None:
    """Raise the host's exception if the user pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def free_memory(patcher: Any) -> int | None:
    """Bytes that activations may take on the device of a model, with what the host would take from its weights for them.

    None where there is no telling: on the CPU, and with DirectML, for which the host has a made-up figure.
    """
    device = patcher.load_device
    if device.type == "cpu" or comfy.model_management.directml_enabled:
        return None
    own = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)  # newer hosts: with dynamic VRAM
    return int(own(device))


def release_memory() -> None:
    """Give cached device memory back, after running out."""
    discard = getattr(comfy.model_management, "discard_cuda_async_error", None)  # newer hosts
    if discard is not None and torch.cuda.is_available():
        discard()
    comfy.model_management.soft_empty_cache()
