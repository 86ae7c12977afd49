"""Choice of device and number type, and free memory of devices."""

from __future__ import annotations

import psutil
import torch

from ..errors import InputError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


def choose_device(name: str) -> torch.device:
    """The device called ``name``, such as "cpu" or "cuda:1"; "auto" is the first available accelerator, or the CPU.

    Raises:
        InputError: for an unknown or unavailable device.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = next((kind for kind in ("cuda", "xpu", "mps") if _available(kind)), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}: expected one of {', '.join(DEVICES)}") from error
    if device.type not in DEVICES or (device.type != "cpu" and not _available(device.type)):
        raise InputError(f"device {name!r} is not available on this machine: use auto or cpu")
    if device.type != "cpu" and (device.index or 0) >= (count := getattr(torch, device.type).device_count()):
        raise InputError(f"device {name!r} is not available on this machine: it has {count} {device.type} devices, from 0")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The number type called ``name``; "auto" is fp16 on accelerators, as published, and fp32 on the CPU.

    Raises:
        InputError: for an unknown name.

    >>> choose_dtype("auto", torch.device("cpu"))
    torch.float32
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in DTYPES:
        raise InputError(f"unknown number type {name!r}: expected one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def free_memory(device: torch.device, limit: int | None = None) -> int | None:
    """Bytes available for new allocations on an accelerator, torch's cache included; None on the CPU.

    Args:
        limit: maximum bytes for this process, including what it already holds; None for all of the device.
    """
    if device.type == "cpu":
        return None
    held = held_memory(device)
    if device.type == "mps":
        free = torch.mps.recommended_max_memory() - held
    else:
        part = getattr(torch, device.type)
        free = _unused(device) + part.memory_reserved(device) - held
    return free if limit is None else max(0, min(free, limit - held))


def _unused(device: torch.device) -> int:
    """Bytes of an accelerator not used by any program, or, if the driver cannot tell, not used by this one."""
    part = getattr(torch, device.type)
    try:
        return part.mem_get_info(device)[0]
    except RuntimeError:
        if device.type != "xpu":
            raise
        return part.get_device_properties(device).total_memory - part.memory_reserved(device)  # integrated Intel GPUs


def held_memory(device: torch.device) -> int:
    """Bytes of this process's tensors on an accelerator, which must not be the CPU."""
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return getattr(torch, device.type).memory_allocated(device)


def free_ram() -> int:
    """Bytes of host memory available without swapping."""
    return psutil.virtual_memory().available


def release_memory(device: torch.device) -> None:
    """Free the cached memory of an accelerator."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def _available(kind: str) -> bool:
    return {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}[kind].is_available()
