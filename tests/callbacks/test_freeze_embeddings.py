"""That tokens are bit-equal from the pivot on is in tests/modules/test_sdxl.py, on a real module."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_edm.callbacks import FreezeEmbeddings
from lit_edm.errors import InputError


class Toy(LightningModule):
    """The smallest module with embeddings."""

    def __init__(self, optimizer: type[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.linear = nn.Linear(2, 2)
        self.embedding = nn.Parameter(torch.ones(2))
        self.moved: list[bool] = []

    def embedding_parameters(self) -> list[nn.Parameter]:
        return [self.embedding]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.linear(batch + self.embedding).pow(2).mean()

    def on_train_batch_start(self, *_: object) -> None:
        self.before = self.embedding.detach().clone()

    def on_train_batch_end(self, *_: object) -> None:
        self.moved.append(not self.before.equal(self.embedding))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def moves(ti_frac: float, optimizer: str = "torch.optim.AdamW", **length: int) -> list[bool]:
    module_name, name = optimizer.rsplit(".", 1)
    module = Toy(getattr(__import__(module_name, fromlist=[name]), name))
    trainer = Trainer(
        **length,
        callbacks=[FreezeEmbeddings(ti_frac)],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.randn(32, 2), batch_size=4))
    return module.moved


@pytest.mark.parametrize("optimizer", ["torch.optim.AdamW", "torch.optim.SGD", "prodigyopt.Prodigy"])
def test_embeddings_stop_at_ti_frac(optimizer: str) -> None:
    assert moves(0.25, optimizer, max_steps=8) == [True] * 2 + [False] * 6


def test_half_of_one_epoch_is_half_of_its_steps() -> None:
    assert moves(0.5, max_epochs=1) == [True] * 4 + [False] * 4


@pytest.mark.parametrize("ti_frac", [-0.1, 1.1, float("nan")])
def test_fraction_outside_its_range(ti_frac: float) -> None:
    with pytest.raises(InputError, match=r"FreezeEmbeddings\.ti_frac is .*in \[0, 1\]"):
        FreezeEmbeddings(ti_frac)


def test_a_run_without_end() -> None:
    with pytest.raises(InputError, match=r"set trainer\.max_steps or trainer\.max_epochs"):
        moves(0.5, max_epochs=-1)
