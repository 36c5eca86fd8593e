from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader


class ThreeGroups(LightningModule):
    """The smallest module with all groups, which keeps what became of each in every batch."""

    def __init__(self, optimizer: Callable[[Any], Optimizer] = AdamW, **settings: float) -> None:
        super().__init__()
        self.optimizer, self.settings = optimizer, settings
        self.unet, self.text_encoders, self.embeddings = (nn.Parameter(torch.ones(2)) for _ in range(3))
        self.resting: set[str] = set()
        self.rested: list[set[str]] = []
        self.clipped: list[set[str]] = []
        self.moved: list[set[str]] = []

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {name: [parameter] for name, parameter in self.named_parameters()}

    def set_trained(self, group: str, trained: bool) -> None:
        (self.resting.discard if trained else self.resting.add)(group)

    def on_train_batch_start(self, *_: object) -> None:
        self.before = {name: parameter.detach().clone() for name, parameter in self.named_parameters()}
        self.rested.append(set(self.resting))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (batch * self.unet + self.text_encoders + self.embeddings).square().mean()

    def configure_gradient_clipping(self, *arguments: Any, **settings: Any) -> None:
        self.clipped.append({name for name, parameter in self.named_parameters() if parameter.grad is not None})
        super().configure_gradient_clipping(*arguments, **settings)

    def on_train_batch_end(self, *_: object) -> None:
        self.moved.append({name for name, value in self.before.items() if not value.equal(self.get_parameter(name))})

    def configure_optimizers(self) -> Optimizer:
        groups = [{"name": name, "params": parameters} for name, parameters in self.parameter_groups().items()]
        return self.optimizer(groups, **self.settings)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.tensor([[1.0, -2.0]]).repeat(32, 1), batch_size=4)  # type: ignore[arg-type]


@pytest.fixture
def three_groups() -> type[ThreeGroups]:
    """A module with unet, text_encoders and embeddings, whose epochs have eight equal batches."""
    return ThreeGroups
