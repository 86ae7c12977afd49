"""Freed memory is returned to the system as the process grows, and not otherwise."""

import subprocess
import sys

import pytest

from tsdsr_core.system.heap import GROWTH, Heap


def test_memory_is_returned_once_per_growth():
    """The process grows by a quarter of the limit each time, so every fifth check exceeds it; returning takes it to 0."""
    held, returned = [0], []

    def trim():
        returned.append(held[0])
        held[0] = 0

    heap = Heap(lambda: held[0], trim)
    for _ in range(10):
        held[0] += GROWTH // 4
        heap.check()
    assert returned == [GROWTH // 4 * 5] * 2


def test_growth_counts_from_the_minimum():
    """What could not be returned back is in use; what was freed since may not come back unseen."""
    held, returned = [10 * GROWTH], []
    heap = Heap(lambda: held[0], lambda: returned.append(held[0]))
    held[0] = 12 * GROWTH
    heap.check()
    heap.check()
    assert returned == [12 * GROWTH], "it is all in use"
    held[0] = GROWTH
    heap.check()
    held[0] = 3 * GROWTH
    heap.check()
    assert returned == [12 * GROWTH, 3 * GROWTH]


def test_systems_that_cannot_return_memory_go_on():
    held = [0]
    heap = Heap(lambda: held[0], None)
    held[0] = 2 * GROWTH
    heap.check()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc gives memory back")
def test_the_own_heap_shrinks():
    """Blocks of 1 MB between small ones that live on: without a look they stay resident."""
    code = (
        "import psutil, torch\n"
        "from tsdsr_core.system.heap import own_heap\n"
        "big = torch.ones(2**24 // 4); del big  # from here on, blocks up to 16 MB come from the heap\n"
        "heap, resident = own_heap(), lambda: psutil.Process().memory_info().rss\n"
        "blocks = [(torch.ones(2**20 // 4), torch.ones(64)) for _ in range(400)]\n"
        "small = [block[1] for block in blocks]\n"
        "full = resident(); del blocks; freed = resident(); heap.check(); after = resident()\n"
        "print(full - freed, freed - after)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    by_itself, by_looking = map(int, said.split())
    assert by_looking > 200e6 > by_itself
