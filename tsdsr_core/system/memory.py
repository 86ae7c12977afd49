"""Out-of-memory errors: recognising them on any device, and checks that avoid them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger("tsdsr")

RanOut = Callable[[BaseException], bool]
"""Tells whether an error means that memory ran out."""
_IMAGE_BYTES = 6 * 3 * 4
"""Bytes per pixel of the result: six images of three floats (input, reference, result and temporaries of the colour fix)."""
_OUT_OF_MEMORY = (
    "out of memory", "outofmemory", "out_of_memory", "out_of_host_memory", "out_of_device_memory", "out_of_resources",
    "memoryallocation", "alloc_failed", "can't allocate memory", "not enough memory", "insufficient memory",
    "failed to allocate", "could not allocate", "not enough gpu video memory", "invalid buffer size", "larger than int_max",
    "2**31", "2**32",
)  # fmt: skip
"""Parts of the messages of CUDA, HIP, XPU (Unified Runtime, Level Zero), Metal, DirectML, BLAS and DNN libraries, Linux and
Windows."""
_UNCLEAR = (
    "cudnn_status_not_supported", "cudnn_status_internal_error", "unable to find an engine to execute this computation",
    "cublas_status_not_initialized", "hipblas_status_not_initialized", "miopenstatusunknownerror",
    "no suitable algorithm was found",
)  # fmt: skip
"""Messages that such libraries give when a workspace does not fit or there are too many elements, but for other reasons too."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that memory ran out, on any device, or another limit that smaller tiles may avoid."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and (_says(error, _OUT_OF_MEMORY) or is_unclear(error))


def is_unclear(error: BaseException) -> bool:
    """Whether ``error`` may also have another cause; it should be shown as it is if the smallest tile does not help."""
    return not isinstance(error, torch.OutOfMemoryError) and not _says(error, _OUT_OF_MEMORY) and _says(error, _UNCLEAR)


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(phrase in text for phrase in phrases)


def check_ram(needed: int, free: int) -> None:
    """Raise ``MemoryError`` if ``needed`` bytes exceed ``free``, before the system would kill the program."""
    if needed > free:
        raise MemoryError(
            f"the VAE needs {needed / 1e9:.1f} GB of memory for an image of this size, {free / 1e9:.1f} GB are free: choose a "
            "smaller size, or close other programs"
        )


def fits_beside(height: int, width: int, free: int | None) -> bool:
    """Whether an image of ``height`` x ``width`` pixels takes at most a quarter of ``free`` bytes, beside the model.

    Args:
        free: bytes on the device; None for the CPU, where images always fit.
    """
    return free is None or height * width * _IMAGE_BYTES <= free // 4


@dataclass
class ImageDevice:
    """Where images are resized and colour-corrected: on the model's device if they fit beside the model, else on the CPU."""

    device: torch.device | None = None
    """None for wherever the images are."""
    free: Callable[[], int | None] = lambda: None
    """Bytes that are free on the device now; None where there is no limit of a device."""
    release: Callable[[], None] = lambda: None
    """Frees cached memory, after an out-of-memory error."""
    ran_out: RanOut = is_out_of_memory

    def run(self, height: int, width: int, work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """``work`` on ``tensors``, which are moved to one device for it; its result stays there.

        If the device runs out of memory, or lacks an operator, this and all further work is done on the CPU.

        Args:
            height, width: of the largest image in it, in pixels.
        """
        if self.device is None:
            return work(*tensors)
        if fits_beside(height, width, self.free()):
            try:
                return work(*(tensor.to(self.device) for tensor in tensors))
            except RuntimeError as error:
                if self.device.type == "cpu" or not (self.ran_out(error) or isinstance(error, NotImplementedError)):
                    raise
                said = "images of %dx%d pixels failed on %s (%s); continuing with them on the CPU"
                log.warning(said, width, height, self.device, str(error).partition("\n")[0])
            self.device = torch.device("cpu")
            self.release()  # here, since the error no longer refers to tensors
        return work(*(tensor.cpu() for tensor in tensors))
