"""How exact matrix products in float32 are."""

from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class MatmulPrecision(Callback):
    """Lets matrix products of float32 values be computed faster and less exactly, on GPUs that can.

    Args:
        precision: highest computes them in float32; high in TF32, whose 10 bits of fraction are enough for training;
            medium in bf16.
    """

    def __init__(self, precision: Literal["highest", "high", "medium"] = "high") -> None:
        self.precision = precision

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the precision, for this process and for good."""
        torch.set_float32_matmul_precision(self.precision)
