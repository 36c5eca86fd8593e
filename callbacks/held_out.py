"""Which held-out image is which, and noise that belongs to it, on any number of processes."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler

from lit_edm.errors import InputError
from lit_edm.seeds import seed_of


def held_out_examples(
    trainer: Trainer, batch: dict[str, Any], batch_idx: int, dataloader_idx: int
) -> tuple[dict[str, Any], list[int]]:
    """Returns the examples of a validation batch that no other process has, and the index of each in the data set.

    Distributed loaders repeat images so that all processes have equally many; here each image counts once.

    Args:
        trainer: Knows the loaders.
        batch: Tensors and lists with one entry an example.
        batch_idx: Number of the batch on this process.
        dataloader_idx: Number of the loader.

    Raises:
        InputError: There are fewer images than processes.
    """
    loaders = trainer.val_dataloaders
    loader: Any = loaders[dataloader_idx] if isinstance(loaders, list) else loaders
    count, sampler = len(loader.dataset), loader.sampler
    processes, rank = (sampler.num_replicas, sampler.rank) if isinstance(sampler, DistributedSampler) else (1, 0)
    if count < processes:
        raise InputError(f"there are {count} held-out images for {processes} processes: hold out more")
    first = batch_idx * loader.batch_size
    positions = range(first, first + len(batch["image"]))
    indices = [index for position in positions if (index := position * processes + rank) < count]
    return {key: values[: len(indices)] for key, values in batch.items()}, indices


def fixed_noise(indices: list[int], shape: tuple[int, ...], *seeds: int) -> Tensor:
    """Returns unit noise (B, *shape), on the CPU, each a function of the seeds and of the example's index alone."""
    seeded = [torch.Generator().manual_seed(seed_of(*seeds, index)) for index in indices]
    return torch.stack([torch.randn(shape, generator=generator) for generator in seeded])
