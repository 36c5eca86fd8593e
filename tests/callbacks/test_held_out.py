from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lit_edm.callbacks import ValidationFrechetDistance, ValidationLoss
from lit_edm.callbacks.held_out import fixed_noise, held_out_examples
from lit_edm.errors import InputError

Make = Callable[..., Any]


class Validating:
    """All of a trainer that is asked."""

    def __init__(self, loaders: Any) -> None:
        self.val_dataloaders = loaders


def visited(count: int, batch_size: int, processes: int) -> list[int]:
    images = [{"image": torch.tensor([index]), "name": str(index)} for index in range(count)]
    seen = []
    for rank in range(processes):
        sampler = DistributedSampler(images, processes, rank, shuffle=False) if processes > 1 else None  # type: ignore[arg-type]
        loader = DataLoader(images, batch_size, sampler=sampler)  # type: ignore[arg-type]
        for batch_idx, batch in enumerate(loader):
            examples, indices = held_out_examples(Validating([loader]), batch, batch_idx, 0)  # type: ignore[arg-type]
            assert examples["image"].flatten().tolist() == indices == [int(name) for name in examples["name"]]
            seen += indices
    return seen


@pytest.mark.parametrize(("count", "batch_size", "processes"), [(7, 3, 1), (7, 3, 2), (7, 1, 3), (6, 2, 3), (5, 4, 4)])
def test_every_image_once_under_its_own_index(count: int, batch_size: int, processes: int) -> None:
    assert sorted(visited(count, batch_size, processes)) == list(range(count))


def test_fewer_images_than_processes() -> None:
    with pytest.raises(InputError, match="2 held-out images for 3 processes"):
        visited(2, 1, 3)


def test_noise_belongs_to_its_image() -> None:
    both = fixed_noise([4, 9], (1, 50, 50), 0, 2)
    assert both[1:].equal(fixed_noise([9], (1, 50, 50), 0, 2))
    others = torch.cat([both, fixed_noise([4], (1, 50, 50), 0, 3), fixed_noise([4], (1, 50, 50), 1, 2)])
    assert (torch.corrcoef(others.flatten(1)) - torch.eye(4)).abs().max() < 0.1
    assert others.std() == pytest.approx(1, abs=0.05)


def test_two_processes_agree_with_one(pixels: Make, patches: Make, trainer: Make) -> None:
    """Five held-out images for two processes: the loader repeats one, which must not count twice."""
    logged = []
    for settings in ({}, {"strategy": "ddp_fork", "devices": 2}):
        run = trainer(ValidationLoss(), ValidationFrechetDistance(num_steps=3), **settings)
        run.validate(pixels(), patches(batch_size=2, held_out=5 / 11), verbose=False)
        logged.append({name: float(value) for name, value in run.callback_metrics.items()})
    assert len(logged[0]) == 10
    assert logged[1] == pytest.approx(logged[0], rel=1e-5)
