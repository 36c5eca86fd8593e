"""Seeds: every random number of a run is a function of the run's seed and of where it is drawn."""

import os

import numpy as np


def run_seed() -> int:
    """Returns the seed of the run, where seed_everything leaves it; 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def seed_of(*numbers: int) -> int:
    """Mixes numbers, none negative, to a seed of 64 bits; those of neighbouring numbers have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
