"""Seeds: every random number of a run is a function of the run's seed and of where it is drawn."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def run_seed() -> int:
    """Returns the seed of the run, where seed_everything leaves it; 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Lets torch's generators begin from a seed, and leaves that of the CPU as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def seed_all(seed: int) -> None:
    """Seeds all global generators: torch's on every device, NumPy's and Python's, which users' own parts may use."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (the legacy generator is the global one)


def seed_of(*numbers: int) -> int:
    """Mixes numbers, none negative, to a seed of 64 bits; those of neighbouring numbers have nothing in common."""
    entropy = len(numbers), *numbers  # NumPy takes (1, 0) for (1,)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
