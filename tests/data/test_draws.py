from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_edm.data.draws import Draw, EpochBatches, Passes, Pool, Spread, cut, pools_by_size

WIDE, TALL = (16, 32), (32, 16)
POOLS = [
    Pool(range(5), WIDE, draws=10),
    Pool(range(5, 12), WIDE, draws=10, weight=0.5),  # class images, of which some are shown twice
    Pool(range(12, 15), TALL, draws=6),
]


def epochs_of(pools: Sequence[Pool], batch_size: int, world_size: int = 1, epoch: int = 0) -> list[list[list[Draw]]]:
    """The batches of each process."""
    batches = [EpochBatches(pools, batch_size, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    for sampler in batches:
        sampler.set_epoch(epoch)
    assert {len(sampler) for sampler in batches} == {len(list(sampler)) for sampler in batches}
    return [list(sampler) for sampler in batches]


def size_of(draw: Draw) -> tuple[int, int]:
    return next(pool.size for pool in POOLS if draw.item in pool.items)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 7, 40])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("epoch", [0, 1])
class TestEpoch:
    def test_shows_every_item_as_often_as_it_should(self, batch_size: int, world_size: int, epoch: int) -> None:
        shown = Counter(
            draw.item
            for batches in epochs_of(POOLS, batch_size, world_size, epoch)
            for batch in batches
            for draw in batch
            if draw.weight
        )
        assert [shown[item] for item in (*range(5), *range(12, 15))] == [2] * 8
        assert sorted(shown[item] for item in range(5, 12)) == [1] * 4 + [2] * 3

    def test_has_one_size_a_batch_the_same_on_every_process(self, batch_size: int, world_size: int, epoch: int) -> None:
        for together in zip(*epochs_of(POOLS, batch_size, world_size, epoch), strict=True):
            assert len({size_of(draw) for batch in together for draw in batch}) == 1
            assert len({len(batch) for batch in together}) == 1
            assert 1 <= len(together[0]) <= batch_size

    def test_processes_average_to_the_mean_over_what_is_shown(
        self, batch_size: int, world_size: int, epoch: int
    ) -> None:
        """As one process does with batches as large as theirs together: same examples, same draws, same weights."""
        alone = epochs_of(POOLS, batch_size * world_size, epoch=epoch)[0]
        losses = torch.rand(15, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()

        def mean(batch: list[Draw]) -> float:
            return sum(draw.weight * losses[draw.item] for draw in batch) / len(batch)

        for whole, *parts in zip(alone, *epochs_of(POOLS, batch_size, world_size, epoch), strict=True):
            assert sum(map(mean, parts)) / world_size == pytest.approx(mean(whole))
            seeds = {draw.seed for part in parts for draw in part if draw.weight}
            assert seeds == {draw.seed for draw in whole}


def test_epochs_differ_and_follow_from_the_seed() -> None:
    (first,), (second,) = epochs_of(POOLS, 4), epochs_of(POOLS, 4, epoch=1)
    assert first == epochs_of(POOLS, 4)[0]
    assert [[draw.item for draw in batch] for batch in first] != [[draw.item for draw in batch] for batch in second]
    assert list(EpochBatches(POOLS, 4, seed=4)) != first
    torch.manual_seed(1)
    assert epochs_of(POOLS, 4)[0] == first


def test_no_two_draws_share_a_seed() -> None:
    seeds = [draw.seed for e in range(3) for batch in epochs_of(POOLS, 4, epoch=e)[0] for draw in batch]
    assert len(seeds) == len(set(seeds)) == 3 * 26


def test_every_image_is_seen_before_any_is_seen_again() -> None:
    (batches,) = epochs_of([Pool(range(5), WIDE, draws=20)], batch_size=1)
    items = [batch[0].item for batch in batches]
    assert [sorted(items[start : start + 5]) for start in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4
    assert len({tuple(items[start : start + 5]) for start in range(0, 20, 5)}) > 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_batch_is_a_fair_sample_of_images_and_class_images(world_size: int) -> None:
    pools = [Pool(range(10), WIDE, 30), Pool(range(10, 60), WIDE, 30)]
    for batches in epochs_of(pools, batch_size=2, world_size=world_size):
        assert all(sorted(draw.item < 10 for draw in batch) == [False, True] for batch in batches)


def test_sizes_take_turns() -> None:
    (batches,) = epochs_of([Pool(range(30), WIDE, 30), Pool(range(30, 40), TALL, 10)], batch_size=1)
    tall = [number for number, batch in enumerate(batches) if batch[0].item >= 30]
    assert all(2 <= second - first <= 6 for first, second in pairwise(tall))


class TestPoolsBySize:
    @pytest.mark.parametrize("draws", [1, 4, 12, 13, 24, 100])
    def test_every_item_is_shown_equally_often_but_for_one(self, draws: int) -> None:
        sizes = [WIDE] * 7 + [TALL] * 4 + [WIDE]
        pools = pools_by_size(range(20, 32), sizes, draws, weight=0.3)
        assert sum(pool.draws for pool in pools) == draws
        assert {sum(pool.count(Fraction(turn, 24)) for pool in pools) for turn in range(24)} == {draws}
        for pool in pools:
            assert pool.weight == 0.3
            assert {sizes[item - 20] for item in pool.items} == {pool.size}
        shown = Counter(draw.item for batch in epochs_of(pools, 3)[0] for draw in batch)
        assert {shown[item] for item in range(20, 32)} <= {draws // 12, -(-draws // 12)}

    def test_repeats_are_exact(self) -> None:
        pools = pools_by_size(range(3), [WIDE, TALL, WIDE], draws=12)
        assert [(list(pool.items), pool.draws) for pool in pools] == [([0, 2], 8), ([1], 4)]

    @pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (2, 1), (4, 1), (2, 2), (64, 1)])
    def test_sizes_take_turns_where_there_are_more_images_than_draws(self, batch_size: int, world_size: int) -> None:
        """Every one is shown in some epoch, equally often, and epochs are equally long all the same."""
        sizes = [WIDE] * 20 + [(n, 8) for n in range(1, 7)] + [TALL] * 14
        images, others = [Pool(range(4), WIDE, 4), Pool([4], TALL, 1)], pools_by_size(range(5, 45), sizes, draws=5)
        shown, lengths = Counter[int](), set[int]()
        for epoch in range(400):
            (batches, *_) = epochs = epochs_of([*images, *others], batch_size, world_size, epoch)
            drawn = [draw.item for process in epochs for batch in process for draw in batch if draw.weight]
            assert len(drawn) == 10
            assert len(set(drawn)) == 10
            lengths.add(len(batches))
            shown.update(drawn)
        assert len(lengths) == 1
        assert all(shown[item] == 400 for item in range(5))
        assert all(20 < shown[item] < 90 for item in range(5, 45)), "50 in the mean"
        assert all(48 <= shown[item] <= 52 for item in range(25, 31)), "those that are alone in their size"


@pytest.mark.parametrize(
    ("count", "batches", "borders"),
    [(0, 0, [0]), (8, 2, [0, 4, 8]), (9, 3, [0, 4, 8, 9]), (9, 4, [0, 2, 4, 6, 9]), (3, 3, [0, 1, 2, 3])],
)
def test_batches_are_full_unless_there_are_to_be_more(count: int, batches: int, borders: list[int]) -> None:
    assert cut(count, batches, 4, torch.arange(batches + 1)).tolist() == borders


def test_spreading_keeps_each_sequence_in_order() -> None:
    which, numbers = Spread([2, 0, 6], torch.Generator().manual_seed(0)).part(0, 8)
    assert numbers[which == 0].tolist() == [0, 1]
    assert numbers[which == 2].tolist() == [0, 1, 2, 3, 4, 5]
    first, second = (which == 0).nonzero().flatten().tolist()
    assert 2 <= second - first <= 5


@pytest.mark.parametrize("counts", [[1], [5, 1, 90], [0, 7, 0, 3], [1000, 999], [3] * 50])
def test_any_part_of_what_is_spread_is_that_of_the_whole(counts: list[int]) -> None:
    spread, total = Spread(counts, torch.Generator().manual_seed(len(counts))), sum(counts)
    keys = [
        ((n + phase) / c, which, n)
        for which, (c, phase) in enumerate(zip(counts, spread.phases, strict=True))
        for n in range(c)
    ]
    whole = [(which, n) for _, which, n in sorted(keys)]
    for start, end in [(0, total), (0, 1), (total // 2, total // 2 + 1), (total // 3, total), (total - 1, total)]:
        which, numbers = spread.part(start, end)
        assert list(zip(which.tolist(), numbers.tolist(), strict=True)) == whole[start:end]


@pytest.mark.parametrize("start", [1, 7, 20])
def test_an_epoch_goes_on_anywhere(monkeypatch: pytest.MonkeyPatch, start: int) -> None:
    sampler = EpochBatches(POOLS, batch_size=1)
    whole = list(sampler)
    monkeypatch.setattr("lit_edm.data.draws.AT_ONCE", 3)
    sampler.start = start
    assert list(sampler) == whole[start:]


class Largest(TorchDispatchMode):
    """Notes the most bytes of a tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))])
        return result


def made(repeats: int, start: int = 0) -> int:
    """The most bytes of a tensor that the first batches of an epoch take, of 150 images in two sizes."""
    sampler = EpochBatches([Pool(range(100), WIDE, 100 * repeats), Pool(range(100, 150), TALL, 50 * repeats)], 4)
    sampler.start = start
    with Largest() as largest:
        batches = iter(sampler)
        for _ in range(10):
            next(batches)
    return largest.bytes


def test_repeats_and_the_place_in_an_epoch_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_edm.data.draws.SKIPPED_AT_ONCE", 2**14)
    assert made(10**4) < 1.1 * made(1000)
    assert made(10**4, start=10**5) < 1.1 * made(1000)


def test_orders_are_those_that_were_ever_drawn() -> None:
    """All passes at once, as in the first release, whose checkpoints go on in the middle of an epoch."""
    generator, twin = (torch.Generator().manual_seed(5) for _ in range(2))
    whole = torch.rand(4, 7, generator=twin).argsort(dim=1).flatten()[:23]
    passes = Passes(range(7), 23, generator)
    assert generator.get_state().equal(twin.get_state())
    assert passes.shown(torch.arange(5, 9)).tolist() == [[int(whole[n]), 1 + n // 7] for n in range(5, 9)]
    assert passes.shown(torch.arange(21, 23))[:, 0].equal(whole[21:])
