"""Tiles between host memory and a GPU, with the CPU in the part of a GPU that does everything as late as it may."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
from torch import Tensor

from tsdsr_core.vae import transfer
from tsdsr_core.vae.program import decoder_program, encoder_program

from .test_program import small_vae
from .test_tiled import ROUNDING, latents, pixels, tiled, untiled, worst


class Event:
    def __init__(self, gpu: LateGpu, stream: Stream) -> None:
        self.gpu, self.stream, self.read = gpu, stream, list(stream.reading)

    def synchronize(self) -> None:
        self.stream.finish()
        known = {id(buffer) for buffer in self.read}
        self.stream.reading = [buffer for buffer in self.stream.reading if id(buffer) not in known]


class Stream:
    """Queues copies until it is waited for; until then there is nothing at their ends."""

    def __init__(self, gpu: LateGpu) -> None:
        self.gpu = gpu
        self.queue: list[tuple[Tensor, weakref.ref]] = []
        self.kept: list[Tensor] = []
        self.reading: list[torch.UntypedStorage] = []
        """Buffers of which the host does not know yet that they were read."""
        self.follows_computing = False

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.fill_(torch.nan)
        if self is self.gpu.arriving:
            self.gpu.unguarded.add(id(target))
        if self is self.gpu.arriving or self.follows_computing:  # otherwise the source is not computed yet
            self.queue.append((target, weakref.ref(source)))
        self.follows_computing = False

    def finish(self) -> None:
        for target, source in self.queue:
            if (kept := source()) is not None:  # otherwise its memory has been given to something else
                self.gpu.copy_(target, kept)
                self.gpu.computing.reading += [kept.untyped_storage()] if self is self.gpu.arriving else []
        self.queue, self.kept = [], []

    def wait_stream(self, other: Stream) -> None:
        other.finish()
        self.follows_computing = other is self.gpu.computing

    def record_event(self) -> Event:
        return Event(self.gpu, self)


class LateGpu:
    """Stands in for CUDA: what is computed is done at once, copies at the last moment that the program allows."""

    def __init__(self, monkeypatch) -> None:
        self.copy_ = Tensor.copy_
        self.arriving, self.leaving, self.computing = (Stream(self) for _ in range(3))
        self.current, self.unguarded, self.races = self.computing, set(), 0
        monkeypatch.setattr(transfer, "_staged", lambda view, device: True)
        monkeypatch.setattr(transfer, "_streams", lambda device: (self.arriving, self.leaving))
        monkeypatch.setattr(torch.cuda, "stream", self._make_current)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(
            Tensor, "copy_", lambda target, source, non_blocking=False: self._copy(target, source, non_blocking)
        )
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self._keep(tensor, stream))
        monkeypatch.setattr(torch, "empty", lambda *args, _empty=torch.empty, pin_memory=False, **kw: _empty(*args, **kw))

    @contextlib.contextmanager
    def _make_current(self, stream: Stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        if non_blocking:
            self.current.copy(target, source)
            return target
        self.races += target.untyped_storage().data_ptr() in [buffer.data_ptr() for buffer in self.computing.reading]
        return self.copy_(target, source)

    def _keep(self, tensor: Tensor, stream: Stream) -> None:
        stream.kept.append(tensor)
        if stream is self.computing:
            stream.kept.clear()  # computed at once
            self.unguarded.discard(id(tensor))


@pytest.mark.rounding
@pytest.mark.parametrize("keys", ["device", "host"])
@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_maps_in_host_memory_are_written_late_and_right(monkeypatch, half, keys):
    """Deleting any of the mover's synchronisations fails here: with other pixels, a race or an unguarded tile."""
    vae = small_vae()
    program, x = (decoder_program(vae), latents(13, 9)) if half == "decoder" else (encoder_program(vae), pixels(107, 90))
    reference, late, flush = untiled(vae, x), [], transfer.Mover.flush

    def counted(mover, leave=0):
        flush(mover, leave)
        late.append(len(mover._pending))

    monkeypatch.setattr(transfer.Mover, "flush", counted)
    gpu = LateGpu(monkeypatch)
    assert worst(tiled(program, x, 24, "host", keys), reference) <= ROUNDING
    assert (gpu.races, gpu.unguarded) == (0, set())
    assert set(late) == {0, 1}


def test_writing_takes_no_memory(monkeypatch):
    """It runs outside of the guard against running out of memory: buffers and layouts are made ready before."""
    LateGpu(monkeypatch)
    mover, map_ = transfer.Mover(torch.device("cpu")), torch.zeros(1, 4, 30, 50)
    tile = torch.randn(1, 4, 30, 50).contiguous(memory_format=torch.channels_last)
    ready = mover.ready(map_, tile)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("memory was taken"))
    for _ in range(3):
        mover.write(map_, ready)
    mover.flush()
    assert torch.equal(map_, tile)
    assert ready.is_contiguous()


def test_a_tile_on_the_device_of_its_map_is_ready_as_it_is():
    mover, tile = transfer.Mover(torch.device("cpu")), torch.randn(1, 4, 3, 5)
    assert mover.ready(torch.zeros(1, 4, 3, 5).contiguous(memory_format=torch.channels_last), tile) is tile


def test_streams_are_made_once_for_a_device(monkeypatch):
    """Torch keeps the freed memory of each stream for that stream alone."""
    made = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    transfer._streams.cache_clear()
    first, again, other = (transfer._streams(torch.device("cuda", index)) for index in (0, 0, 1))
    transfer._streams.cache_clear()
    assert first is again
    assert first is not other
    assert len(made) == 4


def test_without_pinned_memory_the_buffers_are_pageable(monkeypatch, caplog):
    """What the system says of that is what it says of a device; tiles stay as they are, and the result too."""
    vae, empty = small_vae(), torch.empty
    program, z = decoder_program(vae), latents(13, 9)
    LateGpu(monkeypatch)

    def no_pinned(*args, pin_memory=False, **given):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
        return empty(*args, **given)

    monkeypatch.setattr(torch, "empty", no_pinned)
    assert worst(tiled(program, z, 24, "host", "host"), untiled(vae, z)) <= 1e-5
    assert [record.getMessage() for record in caplog.records] == [
        "no pinned memory, continuing with pageable: CUDA error: out of memory"
    ]
