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
    return DataLoader(dataset, batch_size, shuffle=shuffle, **loading(num_workers))


def loading(num_workers: int) -> dict[str, Any]:
    """Returns how loaders go about it, with so many processes."""
    return {
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }


class ResumableLoader(DataLoader[Example]):
    """A loader that can begin in the middle of an epoch, which Lightning tells by these two methods.

    Where a run was is what Lightning's checkpoints say themselves, and exactly: a batch that was loaded, but that no
    step was made with, is loaded again.
    """

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: see `next_batch`."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing."""


def next_batch(trainer: Any, length: int) -> tuple[int, int]:
    """Returns the epoch that a trainer is in, and how many of its batches were trained with, also of a resumed run.

    Lightning itself moves on to the next epoch only when loaders have begun with their first batches.

    Args:
        trainer: The trainer, its progress restored.
        length: Batches in an epoch.
    """
    loop = trainer.fit_loop
    epoch, batches = loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.processed
    if not loop.restarting:
        return epoch, 0
    return (epoch, batches) if batches < length else (epoch + 1, 0)
