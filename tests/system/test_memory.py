import pytest
import torch

from tsdsr_core.families.sd3 import tile_bytes
from tsdsr_core.system.memory import ImageDevice, check_ram, fits_beside, is_out_of_memory, is_unclear
from tsdsr_core.tiles.memory import CPU_BATCH, LARGEST_BATCH, TileMemory, tile_batch, tile_side


def test_bytes_grow_with_tokens_width_and_type():
    medium = {"patch_size": 2, "num_attention_heads": 24, "attention_head_dim": 64}
    base = tile_bytes(medium, 64, 64, 333, 2)
    assert base == (32 * 32 + 333) * 1536 * 2 * 24
    assert tile_bytes(medium, 64, 64, 333, 4) == 2 * base
    assert tile_bytes(medium, 64, 128, 0, 2) == 2 * tile_bytes(medium, 64, 64, 0, 2)


@pytest.mark.parametrize(
    ("free", "one", "batch"), [(0, 100, 1), (149, 100, 1), (300, 100, 2), (1000, 100, 6), (10**12, 100, LARGEST_BATCH)]
)
def test_batches_fit_with_room_to_spare(free, one, batch):
    assert tile_batch(free, one) == batch


@pytest.mark.parametrize(
    ("free", "side"),
    [(0, 16), (32 * 32 * 150, 32), (48 * 48 * 150, 48), (64 * 64 * 150 - 1, 48), (64 * 64 * 150, 64), (10**12, 64)],
)
def test_the_side_fits_with_room_to_spare(free, side):
    assert tile_side(free, lambda height, width: 100 * height * width) == side


def test_a_cpu_takes_the_published_side_and_a_few_tiles():
    assert (TileMemory().side(), TileMemory().batch(64, 64)) == (64, CPU_BATCH)


def test_too_little_host_memory_is_named_before_the_work():
    check_ram(10, 10)
    with pytest.raises(MemoryError, match=r"needs 3\.0 GB of memory .* 2\.0 GB are free: choose a smaller size"):
        check_ram(3 * 10**9, 2 * 10**9)


def test_pictures_lie_on_a_device_that_has_room_for_many():
    assert fits_beside(16384, 16384, None)
    assert fits_beside(1000, 1000, 4 * 72 * 10**6)
    assert not fits_beside(1000, 1000, 4 * 72 * 10**6 - 4)


META = torch.device("meta")
"""A device for which tensors really leave the CPU."""


def devices_of(*tensors):
    """Work whose result says where it was done."""
    assert len({tensor.device for tensor in tensors}) == 1
    return torch.ones(2).to(tensors[0].device)


def test_pictures_are_worked_on_where_they_fit():
    free = [10**9]
    pictures = ImageDevice(META, lambda: free[0])
    assert pictures.run(1000, 1000, devices_of, torch.ones(1), torch.ones(1, device=META)).device == META
    assert pictures.run(4000, 4000, devices_of, torch.ones(1)).device.type == "cpu"
    free[0] *= 16
    assert pictures.run(4000, 4000, devices_of, torch.ones(1)).device == META, "room is asked for each time"
    assert ImageDevice().run(1, 1, devices_of, torch.ones(1, device=META)).device == META, "by default they stay"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory.\nmore"), NotImplementedError("no such operator"), MemoryError("own")]
)
def test_pictures_go_on_on_the_cpu_where_the_device_fails(error, caplog):
    tried, released = [], []

    def work(tensor):
        tried.append(tensor.device.type)
        if tensor.device == META:
            raise error
        return tensor + 1

    pictures = ImageDevice(META, release=lambda: released.append(1), ran_out=lambda e: is_out_of_memory(e) or e is error)
    if isinstance(error, MemoryError):  # host memory is no matter of devices
        with pytest.raises(MemoryError):
            pictures.run(5, 7, work, torch.ones(1))
        return
    assert [pictures.run(5, 7, work, torch.ones(1)).item() for _ in range(2)] == [2, 2]
    assert (tried, released) == (["meta", "cpu", "cpu"], [1]), "the device is not asked again"
    said = str(error).partition("\n")[0]
    assert [record.getMessage() for record in caplog.records] == [
        f"images of 7x5 pixels failed on meta ({said}); continuing with them on the CPU"
    ]


@pytest.mark.parametrize(("device", "error"), [(META, RuntimeError("a bug")), (torch.device("cpu"), torch.OutOfMemoryError())])
def test_other_errors_of_work_on_pictures_are_raised_at_once(device, error):
    tried = []

    def work(tensor):
        tried.append(tensor.device.type)
        raise error

    with pytest.raises(RuntimeError) as raised:
        ImageDevice(device).run(5, 7, work, torch.ones(1))
    assert (raised.value, tried) == (error, [device.type])


def test_every_device_says_out_of_memory_in_its_own_way():
    assert is_out_of_memory(torch.OutOfMemoryError("Allocation on device"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cudaErrorMemoryAllocation",
        "HIP out of memory. Tried to allocate 9.00 GiB",
        "HIP error: hipErrorOutOfMemory",
        "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
        "XPU out of memory. Tried to allocate 5.12 GiB",
        "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)",
        "Native API failed. Native API returns: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)",
        "Native API failed. Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)",
        "MPS backend out of memory (MPS allocated: 9 GB, other allocations: 1 GB, max allowed: 9 GB)",
        "Invalid buffer size: 9.00 GB",
        "MPSGaph does not support tensor dims larger than INT_MAX",
        "the number of elements needs to be less than 2**32",
        "command buffer failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
        "Could not allocate tensor with 9 bytes. There is not enough GPU video memory available!",
    ],
)
def test_what_means_memory_alone(said):
    assert is_out_of_memory(RuntimeError(said))
    assert not is_unclear(RuntimeError(said))


@pytest.mark.parametrize(
    "said",
    [
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
        "FIND was unable to find an engine to execute this computation",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "miopenStatusUnknownError",
    ],
)
def test_what_may_mean_memory(said):
    """Smaller tiles may help; where they do not, the error is something else."""
    assert is_out_of_memory(RuntimeError(said))
    assert is_unclear(RuntimeError(said))
    assert not is_unclear(RuntimeError(f"{said} out of memory"))
    assert not is_unclear(torch.OutOfMemoryError(said))
