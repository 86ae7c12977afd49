import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsdsr_core.image_size import plan_size


@pytest.mark.parametrize(
    ("size", "scale", "process", "target", "work", "padded"),
    [
        ((128, 128), 4, 512, (512, 512), (512, 512), (512, 512)),
        ((341, 512), 4, 512, (1364, 2048), (1364, 2048), (1376, 2048)),
        ((100, 50), 4, 512, (400, 200), (1024, 512), (1024, 512)),
        ((100, 50), 4, 0, (400, 200), (400, 200), (400, 208)),
        ((1, 1), 1, 512, (1, 1), (512, 512), (512, 512)),
        ((1, 1), 1, 0, (1, 1), (1, 1), (16, 16)),
        ((333, 777), 1.5, 0, (500, 1166), (500, 1166), (512, 1168)),
        ((1, 5000), 4, 512, (4, 20000), (4, 20000), (16, 20000)),  # a strip is not blown up to 512 x 2560000
        ((10, 100), 1, 512, (10, 100), (205, 2048), (208, 2048)),
    ],
)
def test_sizes(size, scale, process, target, work, padded):
    plan = plan_size(size, scale, 16, process)
    assert (plan.target, plan.work, plan.padded) == (target, work, padded)


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(1, 16), st.sampled_from([0, 512]))
def test_sizes_never_shrink_and_padding_is_least(height, width, scale, process):
    plan = plan_size((height, width), scale, 16, process)
    for target, exact, work, padded in zip(plan.target, (height * scale, width * scale), plan.work, plan.padded, strict=True):
        assert abs(target - exact) <= 0.5
        assert target <= work <= padded < work + 16
        assert padded % 16 == 0
