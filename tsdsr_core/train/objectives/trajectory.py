"""Distribution-Aware Sampling Module (DASM) of TSD-SR (Dong et al., CVPR 2025, sec. 3.4): its noise levels, as indices.

A trajectory visits a few levels of the noise schedule, each with less noise than the one before, so that the gradient also
covers details that are visible only at low noise.  With 4 steps and a stride of 50::

    schedule index   0 ......... start ..... +50 ..... +100 ..... +150 ......... 999
    noise            1 (pure)      o --------> o --------> o ---------> o          ~0
    weight                         1          0.3         0.3          0.3
                          first <= start                  start + 150 <= last

The start is random for each sample.  ``losses.distribution_gradient`` evaluates the networks along it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import InputError


@dataclass(frozen=True)
class Trajectory:
    """The levels that a trajectory visits, as indices of a schedule of falling noise."""

    offsets: tuple[int, ...]
    """Distance of each level from the start: 0 first, then rising."""
    weights: tuple[float, ...]
    """Weight of the gradient at each level."""
    starts: tuple[int, int]
    """First and last possible start index."""

    def start(self, draw: Callable[[int], int]) -> int:
        """Draw a start for one sample; ``draw(n)`` returns a random number from 0 to ``n - 1``."""
        first, last = self.starts
        return first + draw(last - first + 1)


def plan(steps: int, stride: int, later_weight: float, first: int, last: int) -> Trajectory:
    """A trajectory of ``steps`` levels, ``stride`` indices apart, that stays between the indices ``first`` and ``last``.

    Args:
        later_weight: weight of each level after the first, which has weight 1.

    Raises:
        InputError: if it does not fit.

    >>> plan(4, 50, 0.3, first=20, last=980)
    Trajectory(offsets=(0, 50, 100, 150), weights=(1.0, 0.3, 0.3, 0.3), starts=(20, 830))
    """
    length = (steps - 1) * stride
    if steps < 1 or stride < 1 or not 0 <= first <= last - length:
        raise InputError(
            f"a trajectory of {steps} steps, {stride} indices apart, does not fit between the indices {first} and {last}: "
            "reduce trajectory_steps or stride"
        )
    return Trajectory(tuple(range(0, length + 1, stride)), (1.0, *[later_weight] * (steps - 1)), (first, last - length))
