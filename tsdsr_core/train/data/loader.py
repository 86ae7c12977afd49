"""Endless batches of a data set, distributed over processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ...errors import InputError


def loader(
    dataset: Dataset[dict[str, Tensor]], batch: int, start: int, rank: int, processes: int, workers: int
) -> Iterator[dict[str, Tensor]]:
    """Endless batches, from global sample number ``start``: dictionaries of stacked tensors ``(batch, ...)``.

    In step k, process ``rank`` takes the ``batch`` samples from number ``start + (k * processes + rank) * batch``.
    torch's global random generator is not used.

    Args:
        rank: number of this process, from 0.
        processes: number of processes.
        workers: processes that load batches in parallel; 0 loads them in this process.

    Raises:
        InputError: as the data set, also from a worker.
    """
    batches: Any = DataLoader(
        _Outcomes(dataset), batch_sampler=batch_numbers(batch, start, rank, processes), collate_fn=_collate,
        num_workers=workers, generator=torch.Generator(),
    )  # fmt: skip
    for found in batches:
        if isinstance(found, InputError):
            raise found
        yield found


class _Outcomes(Dataset[Any]):
    """Returns samples, or errors instead of raising them: DataLoader would add a worker's traceback to the message."""

    def __init__(self, dataset: Dataset[dict[str, Tensor]]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except InputError as error:
            return error


def _collate(samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, InputError)), None) or default_collate(samples)


def batch_numbers(batch: int, start: int, rank: int, processes: int) -> Iterator[list[int]]:
    """The sample numbers of each batch of ``loader``, endlessly.

    >>> batches = batch_numbers(2, 0, rank=1, processes=3)
    >>> next(batches), next(batches)
    ([2, 3], [8, 9])
    """
    firsts = itertools.count(start + rank * batch, processes * batch)
    return (list(range(first, first + batch)) for first in firsts)
