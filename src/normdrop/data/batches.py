"""Which samples form which batch: order, shards and the loader that walks them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor

__all__ = ["Batch", "Batches", "Loader", "Take"]


class Batch(NamedTuple):
    """One process's share of one batch: samples ``first … first + len(indices)`` of ``total``."""

    epoch: int
    number: int
    indices: np.ndarray
    first: int
    total: int


Take = Callable[[Batch], "tuple[Tensor, Tensor]"]


class Batches:
    """The batches of an epoch, in an order that is a pure function of (seed, epoch).

    ``batch_size`` counts the samples of all processes together; each process takes a contiguous
    shard of every batch, so that the shards put together are the batch of a single process.

    A last batch that would leave a process with fewer than two samples is merged into the one
    before, since batch normalization cannot train on one value per channel. While training
    (``shuffle=True``) all shards are equal in size: up to ``world_size - 1`` samples of the last
    batch wait for another epoch. Without shuffling every sample is visited exactly once.

    Args:
        count: number of samples.
        batch_size: samples a batch, over all processes.
        shuffle: a new order each epoch; otherwise the order of the data.
        seed: of the order.
        rank, world_size: this process, and how many there are.

    Example:
        >>> batches = Batches(7, 3, shuffle=False)
        >>> [batch.indices.tolist() for batch in batches]
        [[0, 1, 2], [3, 4, 5, 6]]
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.count, self.shuffle, self.seed = count, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        # A multiple of the number of processes, so that only the last batch can be uneven.
        step = max(batch_size // world_size, 2) * world_size
        starts = list(range(0, count, step))
        if len(starts) > 1 and count - starts[-1] < 2 * world_size:
            starts.pop()
        self.starts = starts
        self.ends = [*starts[1:], count] if starts else []

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Batch]:
        return self.after(0)

    def after(self, skip: int) -> Iterator[Batch]:
        """The batches from number ``skip`` on, as a run that continues within an epoch needs."""
        epoch = self.epoch
        order = np.arange(self.count)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch, 0]).permutation(self.count)
        for number in range(skip, len(self.starts)):
            start, end = self.starts[number], self.ends[number]
            total = end - start
            if self.shuffle:
                total -= total % self.world_size
            first = total * self.rank // self.world_size
            last = total * (self.rank + 1) // self.world_size
            yield Batch(epoch, number, order[start + first : start + last], first, total)


class Loader:
    """Walks the batches of a split in this process; no worker processes, no global generator.

    It has what Lightning looks for: a length, a ``sampler`` with ``set_epoch``, and
    ``state_dict``/``load_state_dict``, so that a run stopped within an epoch continues with the
    very next batch.

    Args:
        take: gives the tensors of a batch.
        batches: the batches.
        ahead: how many batches a background thread prepares meanwhile; worth it where images are
            decoded from files, since Pillow releases the interpreter lock.
    """

    # Lightning asks a loader that has a sampler for this too.
    batch_sampler = None

    def __init__(self, take: Take, batches: Batches, *, ahead: int = 0) -> None:
        self.take, self.sampler, self.ahead = take, batches, ahead
        self._given = 0
        self._skip = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        skip, self._skip = self._skip, 0
        self._given = skip
        batches = self.sampler.after(skip)
        for tensors in self._prepared(batches) if self.ahead else map(self.take, batches):
            self._given += 1
            yield tensors

    def _prepared(self, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        pool = ThreadPoolExecutor(1)
        waiting: list[Future[tuple[Tensor, Tensor]]] = []
        try:
            for batch in batches:
                waiting.append(pool.submit(self.take, batch))
                if len(waiting) > self.ahead:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def state_dict(self) -> dict[str, int]:
        """How far this epoch has come."""
        return {"epoch": self.sampler.epoch, "batch": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next walk begin after the batches that were given; a finished epoch, at 0."""
        self.sampler.set_epoch(state["epoch"])
        self._skip = state["batch"] if state["batch"] < len(self) else 0
