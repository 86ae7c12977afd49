"""Choosing a device and a number type."""

from __future__ import annotations

import psutil
import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")


def choose_device(name: str) -> torch.device:
    """The device called ``name`` ("cuda:1" works too); "auto" takes the first accelerator there is.

    Raises:
        ValueError: for an unknown or absent device.
    """
    if name == "auto":
        name = next((kind for kind in ("cuda", "xpu", "mps") if _available(kind)), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: expected one of {', '.join(DEVICES)}") from error
    if device.type not in DEVICES or (device.type != "cpu" and not _available(device.type)):
        raise ValueError(f"device {name!r} is not available here: use auto or cpu")
    if device.type != "cpu" and (device.index or 0) >= (count := getattr(torch, device.type).device_count()):
        raise ValueError(f"device {name!r} is not available here: {device.type} has {count}, counted from 0")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type called ``name``; "auto" is fp16 on accelerators, as published, and fp32 on the CPU.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in DTYPES:
        raise ValueError(f"unknown type {name!r}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def free_memory(device: torch.device, limit: int | None = None) -> int | None:
    """Bytes that a new allocation on an accelerator may use, or None on the CPU; what torch caches counts as free.

    Args:
        limit: bytes that this process may take in all, what it holds already included; None for what the device has.
    """
    if device.type == "cpu":
        return None
    held = held_memory(device)
    if device.type == "mps":
        free = torch.mps.recommended_max_memory() - held
    else:
        part = getattr(torch, device.type)
        free = part.mem_get_info(device)[0] + part.memory_reserved(device) - held
    return free if limit is None else max(0, min(free, limit - held))


def held_memory(device: torch.device) -> int:
    """Bytes of this process's tensors on an accelerator."""
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return getattr(torch, device.type).memory_allocated(device)


def free_ram() -> int:
    """Bytes of host memory that can be had without swapping."""
    return psutil.virtual_memory().available


def release_memory(device: torch.device) -> None:
    """Give an accelerator's cached memory back."""
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def _available(kind: str) -> bool:
    return {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}[kind].is_available()
