"""Free memory goes back to the system as the process grows, and not otherwise."""

import subprocess
import sys

import pytest

from tsdsr_core.system.heap import GROWTH, Heap


def test_memory_is_given_back_once_per_growth():
    """The process grows by a quarter each time, so that every fifth look is beyond the growth; giving back takes it to 0."""
    held, given = [0], []

    def give_back():
        given.append(held[0])
        held[0] = 0

    heap = Heap(lambda: held[0], give_back)
    for _ in range(10):
        held[0] += GROWTH // 4
        heap.check()
    assert given == [GROWTH // 4 * 5] * 2


def test_growth_counts_from_the_least():
    """What could not be given back is in use; what was freed since may not come back unseen."""
    held, given = [10 * GROWTH], []
    heap = Heap(lambda: held[0], lambda: given.append(held[0]))
    held[0] = 12 * GROWTH
    heap.check()
    heap.check()
    assert given == [12 * GROWTH], "it is all in use"
    held[0] = GROWTH
    heap.check()
    held[0] = 3 * GROWTH
    heap.check()
    assert given == [12 * GROWTH, 3 * GROWTH]


def test_systems_without_it_go_on():
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
