"""Which examples an epoch shows, in which batches and on which process: a function of seed, epoch and rank alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lit_edm.data.buckets import Size
from lit_edm.seeds import seed_of


class Draw(NamedTuple):
    """One showing of an item."""

    item: int
    """Number of the item in its data set."""
    seed: int
    """What everything random about the example follows from: crop, flip and changes of the caption."""
    weight: float
    """Weight of its loss in the mean over the batch."""


@dataclass(frozen=True)
class Pool:
    """Items of one size and kind, which an epoch draws from evenly: none twice more often than another.

    Args:
        items: Numbers of the items.
        size: Height and width of their training images in pixels.
        draws: Examples in an epoch.
        weight: Weight of each example's loss.
    """

    items: Sequence[int]
    size: Size
    draws: int
    weight: float = 1.0

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Returns the items of an epoch and which time, from 1 on, each is shown, (draws, 2); all before any again."""
        items = torch.tensor(self.items)
        passes = ceil(self.draws / len(items))
        order = torch.rand(passes, len(items), generator=generator).argsort(dim=1).flatten()[: self.draws]
        return torch.stack([items[order], 1 + torch.arange(self.draws) // len(items)], dim=1)


def pools_by_size(items: Sequence[int], sizes: Sequence[Size], draws: int, weight: float = 1.0) -> list[Pool]:
    """Makes pools of items of several sizes, so that an epoch shows each floor(draws / items) times or once more.

    Args:
        items: Numbers of the items.
        sizes: Size of each.
        draws: Examples of all of them in an epoch. Each size has the same share of these in every epoch, so that epochs
            are equally long.
        weight: Weight of each example's loss.
    """
    of_size: dict[Size, list[int]] = {}
    for item, size in zip(items, sizes, strict=True):
        of_size.setdefault(size, []).append(item)
    ends = torch.tensor([0, *map(len, of_size.values())]).cumsum(0).tolist()
    shares = [draws * end // len(items) - draws * start // len(items) for start, end in pairwise(ends)]
    return [Pool(of_size[size], size, share, weight) for size, share in zip(of_size, shares, strict=True)]


class EpochBatches(DistributedSampler[list[Draw]]):
    """Yields the batches of an epoch: every item as often as its pool says, shuffled, and one size a batch.

    Pools of one size are mixed evenly, so that every batch is a fair sample of them. Processes share batches of
    `batch_size` times their number. Where the last of a size is too small for that, the mean over all processes of
    `(weight * loss).mean()` is still the mean over its examples: some processes repeat one, with weight 0, and the
    weights of the others make up for it. So several processes train as one does with batches as large as theirs
    together. Lightning leaves a DistributedSampler as it is, and tells it the epoch.

    Args:
        pools: What there is to draw from, no item in two of them.
        batch_size: Examples in a batch, on each process.
        seed: What the order and the draws follow from, together with the epoch.
        rank: Number of this process.
        world_size: Number of processes.
    """

    def __init__(
        self, pools: Sequence[Pool], batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(range(world_size), world_size, rank, seed=seed)  # type: ignore[arg-type] (only its length)
        self.pools = pools
        self.batch_size = batch_size
        self.weight_of = {item: pool.weight for pool in pools for item in pool.items}
        self.sizes = sorted({pool.size for pool in pools})
        self.counts = [sum(pool.draws for pool in pools if pool.size == size) for size in self.sizes]
        self.together = batch_size * world_size
        self.lengths = [ceil(count / self.together) for count in self.counts]
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Says which epoch is next, and how many of its batches a resumed run has had before."""
        if epoch != self.epoch or start:
            self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return sum(self.lengths)

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        shown = torch.cat([self._drawn(size, generator) for size in self.sizes])
        borders = self._borders()[spread(self.lengths, generator)]
        for number in range(self.start, len(borders)):
            start, end = borders[number].tolist()
            yield self._share(shown[start:end].tolist())

    def _borders(self) -> Tensor:
        """Returns the first example of each batch of all processes, and that after its last: size after size."""
        starts = [torch.arange(0, count, self.together) for count in self.counts]
        ends = [(start + self.together).clamp(max=count) for start, count in zip(starts, self.counts, strict=True)]
        before = torch.tensor([0, *self.counts]).cumsum(0)[:-1].repeat_interleave(torch.tensor(self.lengths))
        return before[:, None] + torch.stack([torch.cat(starts), torch.cat(ends)], dim=1)

    def _drawn(self, size: Size, generator: torch.Generator) -> Tensor:
        pools = [pool for pool in self.pools if pool.size == size]
        drawn = torch.cat([pool.drawn(generator) for pool in pools])
        return drawn[spread([pool.draws for pool in pools], generator)]

    def _share(self, batch: list[list[int]]) -> list[Draw]:
        each = ceil(len(batch) / self.num_replicas)
        balance = each * self.num_replicas / len(batch)
        own = batch[self.rank * each : (self.rank + 1) * each]  # neighbours: mixed as evenly as the whole
        draws = [self._draw(item, time, balance) for item, time in own]
        return draws + [self._draw(*batch[0], balance=0.0)] * (each - len(draws))

    def _draw(self, item: int, time: int, balance: float) -> Draw:
        return Draw(item, seed_of(self.seed, self.epoch, item, time), balance * self.weight_of[item])


def spread(counts: Sequence[int], generator: torch.Generator) -> Tensor:
    """Merges sequences of these lengths to one over which each is spread evenly, in its own order.

    Returns:
        What stands at each place of the merged sequence, as its place in all sequences one after the other.
    """
    phases = torch.rand(len(counts), generator=generator, dtype=torch.float64)
    keys = [(torch.arange(count) + phase) / count for count, phase in zip(counts, phases, strict=True)]
    return torch.cat(keys).argsort(stable=True)
