"""What data modules share."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import get_all_start_methods
from threading import Thread
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
    return Loader(dataset, batch_size, **loading(num_workers))


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
    if trainer is not None and trainer.overfit_batches:
        raise InputError("trainer.overfit_batches would take batches apart: give trainer.limit_train_batches")
    batches = EpochBatches(pools, data.batch_size, run_seed(), rank, size)
    return ResumableLoader(dataset, batches, partial(batches_done, trainer), data.num_workers, in_memory)


def batches_done(trainer: Any) -> int:
    """Returns how many batches of its epoch a trainer has trained with, 0 if it is not training."""
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready if trainer and trainer.training else 0


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
        "worker_init_fn": end_with_training,
    }


def end_with_training(worker: int) -> None:
    """Lets nobody but the training process end a worker: a cluster signals all processes, and that one saves first.

    Where a system does not tell who sent a signal, anybody may.
    """
    if hasattr(signal, "sigwaitinfo"):  # blocked once more, for a worker need not inherit what its Loader has blocked
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_when_told_by, args=[os.getppid()], daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class Loader(DataLoader[Example]):
    """A loader whose workers nobody but the training process ends, from the moment on that they are started."""

    def _get_iterator(self) -> Any:
        """Starts workers that have SIGTERM blocked; this process gets one that comes meanwhile right afterwards."""
        if not hasattr(signal, "pthread_sigmask"):
            return super()._get_iterator()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super()._get_iterator()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ResumableLoader(Loader[Example]):
    """A loader that can begin in the middle of an epoch, which Lightning tells by `state_dict` and its counterpart.

    Where a run was is what Lightning's checkpoints say themselves, and exactly: a batch that was loaded, but that no
    step was made with, is loaded again. What is kept here tells whether that place is still the same. Lightning asks
    for an iterator as soon as it counts batches, long before the first one: until that is asked for, nothing is read,
    no worker is started, and no place is looked up.

    Args:
        dataset: Makes batches of draws.
        batches: The draws of each batch.
        done: Tells how many batches of the epoch have been trained with.
        num_workers: Processes that load batches; 0 loads them in the training process.
        in_memory: Whether the data set holds so much that processes have to share its memory.
    """

    def __init__(
        self,
        dataset: Dataset[Example],
        batches: EpochBatches,
        done: Callable[[], int],
        num_workers: int,
        in_memory: bool = False,
    ) -> None:
        how = loading(num_workers, in_memory)
        super().__init__(dataset, batch_size=None, sampler=batches, **how)  # type: ignore[arg-type] (of draws)
        self.batches = batches
        self.done = done
        self.begins_anew = False

    def __iter__(self) -> Iterator[Example]:  # type: ignore[override] (a generator, which begins when it is asked)
        self.batches.start = 0 if self.begins_anew else self.done()
        self.begins_anew = False
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Returns what batches follow from."""
        return self.batches.basis

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Begins the epoch anew, with a warning, if batches followed from something else when this was kept."""
        basis = self.batches.basis
        changed = [key for key, value in basis.items() if state_dict.get(key, value) != value]
        self.begins_anew = bool(changed)
        if changed and self.batches.rank == 0:
            logger.warning(
                "the checkpoint is of a run with other %s, so that its place in the epoch means nothing here: the "
                "epoch begins anew, and training goes on",
                " and ".join(changed),
            )
