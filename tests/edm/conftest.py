import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers each time, alone or among others."""
    torch.manual_seed(1)
