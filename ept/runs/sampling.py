"""Which rows a step takes: rows of like length side by side, and the share of each of several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

FILLER_LABELS = "filler_labels"


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' sampler with a generator of its own: a resumed run meets the order of the uninterrupted one.

    transformers draws from the global generator, whose state at the start of an epoch a run that resumes inside that
    epoch does not know.

    Args:
        batch_size: rows of an optimiser step, over all processes. lengths: tokens of every row.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class SharedBatches(BatchSampler):
    """One process's share of each batch of all processes: `rows / count` of them, and none twice.

    The batches are those of one process with batches of `rows`. (accelerate deals whole batches out in turn, and
    completes the last round of an epoch with rows of its beginning.) A last batch of fewer rows than processes leaves
    some without any: their share is an empty list.

    Args:
        sampler: the order of the rows, the same in every process. rows: of a batch, over all processes.
        index, count: this process, and how many there are.
    """

    def __init__(self, sampler: Any, rows: int, index: int, count: int) -> None:
        self.batch_sampler = BatchSampler(sampler, rows, drop_last=False)
        self.sampler = sampler  # the data loader tells it the epoch
        self.batch_size, self.drop_last = rows // count, False
        self.index, self.count = index, count

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batch_sampler:
            yield batch[self.index :: self.count]

    def __len__(self) -> int:
        return len(self.batch_sampler)


@dataclass
class FillingCollator:
    """`collate`, and for an empty share a batch of the row `filler` that does not count: its labels are all -100, the
    true ones, which the model is called with all the same, are beside them.
    """

    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    filler: dict[str, Any]

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if rows:
            return self.collate(rows)
        batch = self.collate([self.filler])
        return {**batch, "labels": torch.full_like(batch["labels"], -100), FILLER_LABELS: batch["labels"]}
