"""What data modules share."""

import logging
from collections.abc import Sequence
from multiprocessing import get_all_start_methods
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from lit_edm.data.draws import EpochBatches, Pool
from lit_edm.errors import InputError
from lit_edm.seeds import run_seed

Example = TypeVar("Example")

logger = logging.getLogger(__name__)


def check_least(data: Any, **least: int) -> None:
    """Raises InputError if an argument of a data module is smaller than it may be."""
    for key, bound in least.items():
        if getattr(data, key) < bound:
            raise InputError(f"data.init_args.{key} is {getattr(data, key)}: give at least {bound}")


def make_loader(dataset: Dataset[Example], batch_size: int, num_workers: int) -> DataLoader[Example]:
    """Returns batches in the order of the data set.

    Args:
        dataset: The examples.
        batch_size: Examples in a batch.
        num_workers: Processes that load examples; 0 loads them in the training process.
    """
    return DataLoader(dataset, batch_size, **loading(num_workers))


def make_training_loader(
    dataset: Dataset[Example], pools: Sequence[Pool], data: Any, in_memory: bool = False
) -> DataLoader[Example]:
    """Returns the shuffled batches of an epoch, from the place on that the trainer is at.

    Args:
        dataset: Makes batches of draws.
        pools: What an epoch draws from.
        data: The data module: its batch_size, its num_workers and its trainer, if it has one.
        in_memory: Whether the data set holds so much that processes have to share its memory.

    Raises:
        InputError: The trainer would have single examples in place of batches.
    """
    trainer = data.trainer
    rank, size = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
    batches = EpochBatches(pools, data.batch_size, run_seed(), rank, size)
    if trainer is not None:
        if trainer.overfit_batches:
            raise InputError("trainer.overfit_batches would take batches apart: give trainer.limit_train_batches")
        batches.set_epoch(*next_batch(trainer, len(batches)))
    return ResumableLoader(dataset, batches, data.num_workers, in_memory)


def loading(num_workers: int, in_memory: bool = False) -> dict[str, Any]:
    """Returns how loaders go about it.

    Args:
        num_workers: Processes that load examples; 0 loads them in the training process.
        in_memory: Whether a data set holds so much that processes have to share its memory, as forked ones do.
    """
    forks = "fork" in get_all_start_methods()
    if in_memory and num_workers and not forks:
        logger.warning(
            "each of the %d processes that load images gets its own copy of the MemoryCache, for this system cannot "
            "fork: set data.init_args.latent_cache to DiskCache or data.init_args.num_workers to 0",
            num_workers,
        )
    return {
        "num_workers": num_workers,
        "multiprocessing_context": "fork" if in_memory and num_workers and forks else None,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }


class ResumableLoader(DataLoader[Example]):
    """A loader that can begin in the middle of an epoch, which Lightning tells by these two methods.

    Where a run was is what Lightning's checkpoints say themselves, and exactly: a batch that was loaded, but that no
    step was made with, is loaded again: see `next_batch`. What is kept here tells whether that place is still the same.

    Args:
        dataset: Makes batches of draws.
        batches: The draws of each batch.
        num_workers: Processes that load batches; 0 loads them in the training process.
        in_memory: Whether the data set holds so much that processes have to share its memory.
    """

    def __init__(
        self, dataset: Dataset[Example], batches: EpochBatches, num_workers: int, in_memory: bool = False
    ) -> None:
        how = loading(num_workers, in_memory)
        super().__init__(dataset, batch_size=None, sampler=batches, **how)  # type: ignore[arg-type] (of draws)
        self.batches = batches

    def state_dict(self) -> dict[str, Any]:
        """Returns what batches follow from."""
        return self.batches.basis

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begins the epoch anew, with a warning, if batches followed from something else when this was kept."""
        basis = self.batches.basis
        changed = [key for key, value in basis.items() if state_dict.get(key, value) != value]
        if changed:
            self.batches.start = 0
        if changed and self.batches.rank == 0:
            logger.warning(
                "the checkpoint is of a run with other %s, so that its place in the epoch means nothing here: the "
                "epoch begins anew, and training goes on",
                " and ".join(changed),
            )


def next_batch(trainer: Any, length: int) -> tuple[int, int]:
    """Returns the epoch that a trainer is in, and how many of its batches were trained with, also of a resumed run.

    Lightning itself moves on to the next epoch only when loaders have begun with their first batches.

    Args:
        trainer: The trainer, its progress restored.
        length: Batches in an epoch.
    """
    loop, progress = trainer.fit_loop, trainer.fit_loop.epoch_loop.batch_progress
    epoch, batches = loop.epoch_progress.current.processed, progress.current.processed
    if not loop.restarting:
        return epoch, 0
    if progress.is_last_batch and batches == progress.current.ready:  # the epoch has ended, perhaps before its time
        return epoch + 1, 0
    return epoch, batches if batches < length else 0
