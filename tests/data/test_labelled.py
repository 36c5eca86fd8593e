from typing import Any

import pytest
import torch
from torch.utils.data import RandomSampler, SequentialSampler

from lit_edm.data import DigitsDataModule
from lit_edm.errors import InputError


def set_up(**settings: Any) -> DigitsDataModule:
    data = DigitsDataModule(**settings)
    data.setup("fit")
    return data


def indices(data: DigitsDataModule) -> tuple[list[int], list[int]]:
    return list(data.train_set.indices), list(data.val_set.indices)


def test_every_image_is_trained_on_or_held_out() -> None:
    trained, held_out = indices(set_up(held_out=0.3))
    assert len(held_out) == round(0.3 * 1797)
    assert sorted(trained + held_out) == list(range(1797))


def test_the_split_follows_from_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = indices(set_up())
    torch.manual_seed(2)
    assert indices(set_up(batch_size=3)) == first
    assert indices(set_up(seed=1)) != first


def test_loaders_shuffle_what_is_trained_on_alone() -> None:
    data = set_up(num_workers=1)
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, RandomSampler)
    assert loader.persistent_workers
    assert isinstance(data.val_dataloader().sampler, SequentialSampler)  # type: ignore[union-attr]
    labels = torch.cat([batch["label"] for batch in set_up(batch_size=100).val_dataloader()])
    assert labels.tolist() == [data.val_set[index]["label"] for index in range(359)]


def test_nothing_held_out() -> None:
    assert set_up(held_out=0.0).val_dataloader() == []


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_share_outside_its_range(share: float) -> None:
    with pytest.raises(InputError, match=r"data\.init_args\.held_out is .*: give a share in \[0, 1\)"):
        set_up(held_out=share)


@pytest.mark.parametrize(("key", "value", "least"), [("batch_size", 0, 1), ("num_workers", -1, 0), ("seed", -1, 0)])
def test_numbers_too_small(key: str, value: int, least: int) -> None:
    with pytest.raises(InputError, match=rf"data\.init_args\.{key} is {value}: give at least {least}"):
        set_up(**{key: value})
