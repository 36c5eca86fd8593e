"""Which examples an epoch shows, in which batches and on which process: a function of seed, epoch and rank alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lit_edm.data.buckets import Size
from lit_edm.data.transforms import golden
from lit_edm.seeds import seed_of

AT_ONCE = 2**14
"""Draws that are made at once, whatever the length of the epoch."""

SKIPPED_AT_ONCE = 2**20
"""Random numbers of those that come before, likewise."""


class Draw(NamedTuple):
    """One showing of an item."""

    item: int
    """Number of the item in its data set."""
    seed: int
    """What everything random about the example follows from: crop, flip and changes of the caption."""
    weight: float
    """Weight of its loss in the mean over the batch."""
    among: int = 1
    """Draws in the batch that all processes share out."""


@dataclass(frozen=True)
class Pool:
    """Items of one size and kind, which an epoch draws from evenly: none twice more often than another.

    Args:
        items: Numbers of the items.
        size: Height and width of their training images in pixels.
        draws: Examples in an epoch, in the mean over epochs.
        weight: Weight of each example's loss.
        before: Draws of the pools that stand before it where several share a whole number of draws.
    """

    items: Sequence[int]
    size: Size
    draws: int | Fraction
    weight: float = 1.0
    before: Fraction = Fraction(0)

    def count(self, turn: Fraction) -> int:
        """Returns the examples in an epoch whose turn, in [0, 1), says where along the draws shares are rounded up."""
        return floor(self.before + self.draws + turn) - floor(self.before + turn)


def pools_by_size(items: Sequence[int], sizes: Sequence[Size], draws: int, weight: float = 1.0) -> list[Pool]:
    """Makes pools of items of several sizes, so that an epoch shows each floor(draws / items) times or once more.

    Args:
        items: Numbers of the items.
        sizes: Size of each.
        draws: Examples of all of them in an epoch. Where they do not divide, sizes take turns at one more, so that in
            the mean over epochs each item is shown equally often, and in the end every one of them.
        weight: Weight of each example's loss.
    """
    of_size: dict[Size, list[int]] = {}
    for item, size in zip(items, sizes, strict=True):
        of_size.setdefault(size, []).append(item)
    each, before, pools = Fraction(draws, len(items)), Fraction(0), list[Pool]()
    for size, numbers in of_size.items():
        pools.append(Pool(numbers, size, each * len(numbers), weight, before))
        before += each * len(numbers)
    return pools


class EpochBatches(DistributedSampler[list[Draw]]):
    """Yields the batches of an epoch: every item as often as its pool says, shuffled, and one size a batch.

    Pools of one size are mixed evenly, so that every batch is a fair sample of them. All epochs have as many batches:
    where turns would have one need fewer, its largest are split. Processes share batches of `batch_size` times their
    number. Where the last of a size is too small for that, the mean over all processes of
    `(weight * loss).mean()` is still the mean over its examples: some processes repeat one, with weight 0, and the
    weights of the others make up for it. So several processes train as one does with batches as large as theirs
    together. Lightning leaves a DistributedSampler as it is, and tells it the epoch.

    Args:
        pools: What there is to draw from, no item in two of them.
        batch_size: Examples in a batch, on each process.
        seed: What the order and the draws follow from, together with the epoch.
        rank: Number of this process.
        world_size: Number of processes.

    Attributes:
        start: Batches at the beginning of the next epoch that are left out: a resumed run has had them.
    """

    def __init__(
        self, pools: Sequence[Pool], batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(range(world_size), world_size, rank, seed=seed)  # type: ignore[arg-type] (only its length)
        self.pools = pools
        self.batch_size = batch_size
        self.weight_of = {item: pool.weight for pool in pools for item in pool.items}
        self.sizes = sorted({pool.size for pool in pools})
        self.together = batch_size * world_size
        # Counts change only where a turn reaches the next whole number at the border of a pool.
        turns = {-border % 1 for pool in pools for border in (pool.before, pool.before + pool.draws)}
        self.length = max(sum(self._lengths(self._counts(turn))) for turn in turns)
        self.start = 0

    @property
    def basis(self) -> dict[str, Any]:
        """What the batches of every epoch follow from, as plain numbers and text."""
        images = [[*pool.size, len(pool.items), str(pool.draws)] for pool in self.pools]
        return {"seed": self.seed, "batch_size over all processes": self.together, "images and repeats": images}

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        turn = Fraction(golden(self.epoch))
        counts = self._counts(turn)
        lengths = self._split(counts, self._lengths(counts))
        shown = [self._shown(size, turn, generator) for size in self.sizes]
        order, step = Spread(lengths, generator), ceil(AT_ONCE / self.together)
        for start in range(self.start, self.length, step):
            sizes, numbers = order.part(start, min(start + step, self.length))
            batches = [
                self._batches(shown[size], counts[size], lengths[size], numbers[sizes == size])
                for size in range(len(shown))
            ]
            for size in sizes.tolist():
                yield self._share(next(batches[size]))

    def _counts(self, turn: Fraction) -> list[int]:
        """Returns the examples of each size in an epoch."""
        counts = dict.fromkeys(self.sizes, 0)
        for pool in self.pools:
            counts[pool.size] += pool.count(turn)
        return list(counts.values())

    def _lengths(self, counts: Sequence[int]) -> list[int]:
        """Returns the fewest batches that hold so many examples of each size."""
        return [ceil(count / self.together) for count in counts]

    def _split(self, counts: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Returns numbers of batches of each size that add up to the length of every epoch."""
        lengths = list(lengths)
        while sum(lengths) < self.length:
            largest = max(range(len(counts)), key=lambda size: counts[size] / max(lengths[size], 1))
            lengths[largest] += 1
        return lengths

    def _shown(self, size: Size, turn: Fraction, generator: torch.Generator) -> "Shown":
        pools = [pool for pool in self.pools if pool.size == size]
        counts = [pool.count(turn) for pool in pools]
        passes = [Passes(pool.items, count, generator) for pool, count in zip(pools, counts, strict=True)]
        return Shown(passes, Spread(counts, generator))

    def _batches(self, shown: "Shown", count: int, length: int, numbers: Tensor) -> Iterator[list[list[int]]]:
        """Yields batches of one size, of all processes; their numbers follow one on the other."""
        if len(numbers):
            borders = cut(count, length, self.together, torch.arange(int(numbers[0]), int(numbers[-1]) + 2)).tolist()
            draws = shown.part(borders[0], borders[-1]).tolist()
            yield from (draws[start - borders[0] : end - borders[0]] for start, end in pairwise(borders))

    def _share(self, batch: list[list[int]]) -> list[Draw]:
        each = ceil(len(batch) / self.num_replicas)
        balance = each * self.num_replicas / len(batch)
        own = batch[self.rank * each : (self.rank + 1) * each]  # neighbours: mixed as evenly as the whole
        draws = [self._draw(item, time, balance, len(batch)) for item, time in own]
        return draws + [self._draw(*batch[0], balance=0.0, among=len(batch))] * (each - len(draws))

    def _draw(self, item: int, time: int, balance: float, among: int) -> Draw:
        return Draw(item, seed_of(self.seed, self.epoch, item, time), balance * self.weight_of[item], among)


class Spread:
    """Sequences merged to one over which each is spread evenly, in its own order. It is made part by part.

    Args:
        counts: Length of each.
        generator: Draws where in its share of the merged sequence each begins.
    """

    def __init__(self, counts: Sequence[int], generator: torch.Generator) -> None:
        self.counts = counts
        self.phases = torch.rand(len(counts), generator=generator, dtype=torch.float64).tolist()

    def part(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Returns which sequence stands at each place from start to end, and how many of it stand before, (n,) each."""
        # Place k is of a key near k / total, off by less than one for each sequence.
        low, high = ((place + off) / sum(self.counts) for place, off in ((start, -self._off), (end, self._off)))
        spans = [(max(floor(low * count) - 1, 0), min(ceil(high * count) + 1, count)) for count in self.counts]
        numbers = [torch.arange(*span) for span in spans]
        keys = [(n + phase) / count for n, phase, count in zip(numbers, self.phases, self.counts, strict=True)]
        order = torch.cat(keys).argsort(stable=True)
        before = sum(first for first, _ in spans)
        order = order[start - before : end - before]
        which = torch.repeat_interleave(torch.arange(len(numbers)), torch.tensor([len(n) for n in numbers]))
        return which[order], torch.cat(numbers)[order]

    @property
    def _off(self) -> int:
        return len(self.counts) + 1


class Passes:
    """Items in pass after pass, each in an order of its own, of which the last that was asked for is kept.

    Args:
        items: Numbers of the items.
        count: Draws in an epoch.
        generator: Draws the orders of all its passes, and goes on after them: one number for each draw, in no time.
    """

    def __init__(self, items: Sequence[int], count: int, generator: torch.Generator) -> None:
        self.items = torch.tensor(items)
        self.generator = generator.clone_state()
        self._pass, self._order = -1, self.items
        skip(ceil(count / len(items)) * len(items), generator)

    def shown(self, numbers: Tensor) -> Tensor:
        """Returns the items and which time, from 1 on, each is shown, (n, 2).

        Args:
            numbers: Of draws, (n > 0,), sorted; none in a pass before one that was asked for.
        """
        which, places = numbers // len(self.items), numbers % len(self.items)
        passes, counts = which.unique_consecutive(return_counts=True)
        parts = zip(passes.tolist(), places.split(counts.tolist()), strict=True)
        return torch.stack([torch.cat([self._order_of(number)[part] for number, part in parts]), 1 + which], dim=1)

    def _order_of(self, number: int) -> Tensor:
        if number > self._pass:
            skip((number - self._pass - 1) * len(self.items), self.generator)
            self._pass = number
            self._order = self.items[torch.rand(len(self.items), generator=self.generator).argsort()]
        return self._order


def skip(count: int, generator: torch.Generator) -> None:
    """Draws so many numbers that nobody wants."""
    for start in range(0, count, SKIPPED_AT_ONCE):
        torch.rand(min(SKIPPED_AT_ONCE, count - start), generator=generator)


@dataclass(frozen=True)
class Shown:
    """All draws of one size in an epoch.

    Args:
        passes: Of each pool.
        spread: How they are mixed.
    """

    passes: Sequence[Passes]
    spread: Spread

    def part(self, start: int, end: int) -> Tensor:
        """Returns items and times, (n, 2), of the draws from start to end."""
        pools, numbers = self.spread.part(start, end)
        draws = torch.empty(end - start, 2, dtype=torch.int64)
        for pool in pools.unique().tolist():
            draws[pools == pool] = self.passes[pool].shown(numbers[pools == pool])
        return draws


def cut(count: int, batches: int, together: int, numbers: Tensor) -> Tensor:
    """Returns where batches of these numbers begin: full ones and the rest, or equal ones where there are more."""
    return (numbers * together).clamp(max=count) if batches == ceil(count / together) else numbers * count // batches
