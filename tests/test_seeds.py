import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything

from lit_edm.seeds import run_seed, seed_of


def test_seed_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert run_seed() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")  # restored after the test
    seed_everything(7, verbose=False)
    assert run_seed() == 7


def test_seeds_follow_from_their_numbers_alone() -> None:
    """In another process too, where Python's own hash would differ."""
    code = "from lit_edm.seeds import seed_of; print(seed_of(1, 2, 3), seed_of(0))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(seed_of(1, 2, 3)), str(seed_of(0))]


def test_neighbouring_numbers_have_nothing_in_common() -> None:
    numbers = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    seeds = np.array([seed_of(*each) for each in numbers], dtype=np.uint64)
    assert len(set(seeds.tolist())) == 1000
    bits = np.unpackbits(seeds.view(np.uint8).reshape(1000, 8), axis=1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.08, "each of the 64 bits is as often set as not"
    assert np.abs((bits[1:] != bits[:-1]).mean(axis=0) - 0.5).max() < 0.08


def test_order_and_number_of_numbers_count() -> None:
    assert len({seed_of(1, 2), seed_of(2, 1), seed_of(1, 2, 1), seed_of(12)}) == 4


def test_torch_takes_every_seed() -> None:
    seeds = [seed_of(number) for number in range(50)]
    assert max(seeds) >= 2**63, "the largest that C's long holds"
    drawn = [float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in seeds]
    assert len(set(drawn)) == 50
