from collections.abc import Iterator

import pytest
import torch

from lit_edm.callbacks import MatmulPrecision


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_is_set_before_training(precision: str) -> None:
    MatmulPrecision(precision).setup(None, None, "fit")  # type: ignore[arg-type]
    assert torch.get_float32_matmul_precision() == precision
