"""Distribution-Aware Sampling Module of TSD-SR (Dong et al., CVPR 2025, sec. 3.4) as whole numbers.

A trajectory visits a few noise levels of the schedule, each with less noise than the one before, so that the details that
only little noise leaves visible have their say too.  What runs along it is in ``losses``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Trajectory:
    """Which levels a trajectory visits, counted from where it starts in a schedule of falling noise."""

    offsets: tuple[int, ...]
    """Rising, the first 0."""
    weights: tuple[float, ...]
    """Of the gradient at each level."""
    starts: tuple[int, int]
    """First and last index at which it may start."""

    def start(self, draw: Callable[[int], int]) -> int:
        """A start for one sample; ``draw(n)`` gives a number from 0 to ``n - 1``."""
        first, last = self.starts
        return first + draw(last - first + 1)


def plan(steps: int, stride: int, later_weight: float, first: int, last: int) -> Trajectory:
    """A trajectory of ``steps`` levels, ``stride`` indices apart, that stays between the indices ``first`` and ``last``.

    Args:
        later_weight: weight of all levels but the first, whose weight is 1.

    Raises:
        ValueError: where it does not fit in between.
    """
    reach = (steps - 1) * stride
    if steps < 1 or stride < 1 or not 0 <= first <= last - reach:
        raise ValueError(
            f"a trajectory of {steps} steps, {stride} indices apart, does not fit between the indices {first} and {last}: "
            "make trajectory_steps or stride smaller"
        )
    return Trajectory(tuple(range(0, reach + 1, stride)), (1.0, *[later_weight] * (steps - 1)), (first, last - reach))
