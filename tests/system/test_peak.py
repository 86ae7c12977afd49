"""Peak memory: of the process on the CPU, of torch's allocator on an accelerator, or unknown."""

import time

import torch

from tsdsr_core.system.peak import peak_memory

CPU = torch.device("cpu")


def test_on_the_cpu_it_is_the_resident_memory_of_the_process():
    with peak_memory(CPU) as memory:
        held = torch.ones(50 * 2**20)
        time.sleep(0.1)  # several looks
        del held
        assert memory.peak is not None
        assert memory.growth is not None
        assert 0.9 * 200 * 2**20 < memory.growth < 2 * 200 * 2**20
        assert memory.peak > memory.growth


def test_on_an_accelerator_it_is_what_torch_counts(monkeypatch):
    reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100)
    with peak_memory(torch.device("cuda", 1)) as memory:
        assert (memory.peak, memory.growth, reset) == (100, 60, [torch.device("cuda", 1)])


def test_memory_that_torch_cannot_tell_is_not_made_up(monkeypatch):
    def unsupported(device):
        raise RuntimeError("no statistics")

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", unsupported)
    for device in ("mps", "cuda"):
        with peak_memory(torch.device(device)) as memory:
            assert memory.peak is memory.growth is None
