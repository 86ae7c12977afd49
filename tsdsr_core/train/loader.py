"""Endless batches of a data set, shared out among processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate


def loader(
    dataset: Dataset[dict[str, Tensor]], batch: int, start: int, rank: int, processes: int, workers: int
) -> Iterator[dict[str, Tensor]]:
    """Endless batches from global sample number ``start`` on: each sample's tensors stacked, ``(batch, ...)``.

    Step k of process ``rank``, of ``processes``, takes the samples from ``start + (k * processes + rank) * batch`` on.
    Nothing is drawn from torch's global generator.

    Args:
        workers: processes that prepare batches in parallel; 0 prepares them when they are asked for.

    Raises:
        ValueError: what the data set raises, also from a worker.
    """
    batches: Any = DataLoader(
        _Outcomes(dataset), batch_sampler=batch_numbers(batch, start, rank, processes), collate_fn=_collate,
        num_workers=workers, generator=torch.Generator(),
    )  # fmt: skip
    for found in batches:
        if isinstance(found, ValueError):
            raise found
        yield found


class _Outcomes(Dataset[Any]):
    """Samples, or the errors they end in: across processes, an error that is raised becomes a page of text."""

    def __init__(self, dataset: Dataset[dict[str, Tensor]]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except ValueError as error:
            return error


def _collate(samples: list[Any]) -> Any:
    return next((sample for sample in samples if isinstance(sample, ValueError)), None) or default_collate(samples)


def batch_numbers(batch: int, start: int, rank: int, processes: int) -> Iterator[list[int]]:
    """The numbers of the samples in each batch of ``loader``, endlessly."""
    firsts = itertools.count(start + rank * batch, processes * batch)
    return (list(range(first, first + batch)) for first in firsts)
