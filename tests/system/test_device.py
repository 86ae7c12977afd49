"""Devices by name, and the memory they say they have."""

import pytest
import torch

from tsdsr_core.system.device import choose_device, choose_dtype, free_memory, held_memory

CPU = torch.device("cpu")


def test_devices_and_types_are_chosen_by_name():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps", "xpu")
    assert choose_dtype("auto", CPU) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16
    assert choose_dtype("bf16", CPU) == torch.bfloat16
    for name in ("gpu", "meta", *(kind for kind in ("cuda", "mps", "xpu") if not getattr(torch, kind).is_available())):
        with pytest.raises(ValueError, match=name):
            choose_device(name)
    with pytest.raises(ValueError, match="fp8"):
        choose_dtype("fp8", CPU)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_device_that_is_not_there_is_named(kind, monkeypatch):
    monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: True)
    monkeypatch.setattr(getattr(torch, kind), "device_count", lambda: 2)
    assert choose_device(kind) == torch.device(kind)
    assert choose_device(f"{kind}:1") == torch.device(kind, 1)
    with pytest.raises(
        ValueError, match=f"device '{kind}:9' is not available on this machine: it has 2 {kind} devices, from 0"
    ):
        choose_device(f"{kind}:9")


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_what_torch_caches_counts_as_free(kind, monkeypatch):
    """Of 100 bytes others hold 30 and torch 50, 10 of them in its cache."""
    part, device = getattr(torch, kind), torch.device(kind)
    figures = {"mem_get_info": (20, 100), "memory_reserved": 50, "memory_allocated": 40}
    for name, value in figures.items():
        monkeypatch.setattr(part, name, lambda device, value=value: value)
    assert free_memory(device) == 30
    assert held_memory(device) == 40
    assert [free_memory(device, limit) for limit in (30, 40, 55, 70, 1000)] == [0, 0, 15, 30, 30]


def test_a_device_that_cannot_tell_what_is_free_has_what_this_program_does_not_hold(monkeypatch):
    """Integrated Intel GPUs: of 100 bytes torch holds 50, 10 of them in its cache."""

    def unknown(device):
        raise RuntimeError("The device (Intel(R) Arc(TM) Graphics) doesn't support querying the available free memory.")

    device = torch.device("xpu")
    properties = type("Properties", (), {"total_memory": 100})
    for name, value in {"memory_reserved": 50, "memory_allocated": 40, "get_device_properties": properties}.items():
        monkeypatch.setattr(torch.xpu, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.xpu, "mem_get_info", unknown)
    assert free_memory(device) == 60
    monkeypatch.setattr(torch.cuda, "mem_get_info", unknown)
    with pytest.raises(RuntimeError, match="querying"):
        free_memory(torch.device("cuda"))


def test_free_memory_on_a_mac_is_what_metal_recommends_minus_what_is_held(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 40)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 90)
    assert [free_memory(torch.device("mps"), limit) for limit in (None, 60)] == [60, 20]


def test_a_cpu_has_no_limit_of_a_device():
    assert free_memory(CPU) is free_memory(CPU, 10) is None
