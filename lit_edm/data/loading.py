"""What data modules share."""

from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from lit_edm.errors import InputError

Example = TypeVar("Example")


def check_least(data: Any, **least: int) -> None:
    """Raises InputError if an argument of a data module is smaller than it may be."""
    for key, bound in least.items():
        if getattr(data, key) < bound:
            raise InputError(f"data.init_args.{key} is {getattr(data, key)}: give at least {bound}")


def make_loader(
    dataset: Dataset[Example], batch_size: int, num_workers: int, shuffle: bool = False
) -> DataLoader[Example]:
    """Returns the batches of an epoch.

    Args:
        dataset: The examples.
        batch_size: Examples in a batch.
        num_workers: Processes that load examples; 0 loads them in the training process.
        shuffle: Whether each epoch is in an order of its own, or in that of the dataset.
    """
    return DataLoader(
        dataset,
        batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
