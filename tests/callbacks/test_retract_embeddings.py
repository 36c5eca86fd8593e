from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lit_edm.callbacks import ExponentialMovingAverage, FreezeEmbeddings, RetractEmbeddings
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.optim import GroupedProdigy
from lit_edm.sdxl import LoRA
from lit_edm.sdxl.tokens import ExtendedEmbedding

Make = Callable[..., Trainer]


class Rows(Callback):
    """Keeps the rows of both encoders before training and after every batch."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        self.keep(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: SDXLModule, *_: Any) -> None:
        self.keep(pl_module)

    def keep(self, module: SDXLModule) -> None:
        self.seen.append([rows.detach().clone() for rows in module.embedding_parameters()])


def fit(tiny: Path, icons: Path, run: Trainer, optimizer: Any = None) -> SDXLModule:
    optimizer = optimizer or (lambda groups: AdamW(groups, lr=0.01))
    module = SDXLModule(
        str(tiny), tokens={"TOK": 2}, initializers={"TOK": "red"}, adapter=LoRA(rank=2), optimizer=optimizer
    )
    run.fit(module, CaptionedImagesDataModule(icons, resolution=16, batch_size=4, repeats=2))
    return module


def test_rows_are_as_large_as_the_table(tiny: Path, icons: Path, trainer: Make) -> None:
    rows = Rows()
    module = fit(tiny, icons, trainer(RetractEmbeddings(), rows))
    stds = [embedding.table.weight.std() for embedding in module.conditioner.extended_embeddings()]
    assert len(stds) == 2
    assert any(not torch.isclose(value.std(), std) for value, std in zip(rows.seen[0], stds, strict=True))
    for step in rows.seen[1:]:
        for value, std in zip(step, stds, strict=True):
            torch.testing.assert_close(value.std(), std)


class OneTable(LightningModule):
    """Rows of std 2 beside a table of std 1, moved by 0 in each step of SGD."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        table = nn.Embedding.from_pretrained(torch.tensor([[1.0, -1.0], [1.0, -1.0]]) * (3 / 4) ** 0.5)
        self.embedding = ExtendedEmbedding(table, torch.tensor([[1.0, -1.0], [1.0, -1.0]]) * 3**0.5, 2)
        self.conditioner = SimpleNamespace(extended_embeddings=lambda: [self.embedding])
        self.settings = settings

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return 0 * self.embedding.rows.sum()

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), **({"lr": 0.1} | self.settings))

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(4, 1), batch_size=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_strength_is_the_share_of_the_way_in_logarithms(trainer: Make, strength: float) -> None:
    module = OneTable()
    trainer(RetractEmbeddings(strength), max_steps=3).fit(module)
    torch.testing.assert_close(module.embedding.rows.std(), torch.tensor(2.0 ** ((1 - strength) ** 3)))


def test_once_a_step_whatever_is_accumulated(trainer: Make) -> None:
    module = OneTable()
    trainer(RetractEmbeddings(0.5), max_steps=2, accumulate_grad_batches=2).fit(module)
    torch.testing.assert_close(module.embedding.rows.std(), torch.tensor(2.0**0.25))


def test_a_rate_of_0_leaves_them_alone(trainer: Make) -> None:
    module = OneTable(lr=0.0)
    before = module.embedding.rows.detach().clone()
    trainer(RetractEmbeddings(), max_steps=2).fit(module)
    assert module.embedding.rows.equal(before)


@pytest.mark.parametrize("optimizer", [None, lambda groups: GroupedProdigy(groups, d0=1e-2)])
def test_nothing_moves_from_the_pivot_on(tiny: Path, icons: Path, trainer: Make, optimizer: Any) -> None:
    rows = Rows()
    run = trainer(FreezeEmbeddings(0.5), RetractEmbeddings(), rows, max_steps=4, accumulate_grad_batches=2)
    fit(tiny, icons, run, optimizer)
    moved = [not all(a.equal(b) for a, b in zip(x, y, strict=True)) for x, y in pairwise(rows.seen)]
    assert moved == [False, True, False, True, False, False, False, False]


@pytest.mark.parametrize("first", [True, False])
def test_averages_see_retracted_rows(tiny: Path, icons: Path, trainer: Make, first: bool) -> None:
    """With a half-life of 0 at the first step, the average is the weights: in either order of the callbacks."""
    ema, retract = ExponentialMovingAverage(), RetractEmbeddings()
    module = fit(tiny, icons, trainer(*([ema, retract] if first else [retract, ema]), max_steps=1))
    for name, value in ema.average.items():
        assert value.equal(module.get_parameter(name))


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.1, float("nan")])
def test_strength_outside_its_range(strength: float) -> None:
    with pytest.raises(InputError, match=r"RetractEmbeddings\.strength is .*; it must be in \(0, 1\]"):
        RetractEmbeddings(strength)


def test_no_tokens(tiny: Path, icons: Path, trainer: Make) -> None:
    module = SDXLModule(str(tiny), adapter=LoRA(rank=2))
    with pytest.raises(InputError, match=r"RetractEmbeddings .* model\.init_args\.tokens names none"):
        trainer(RetractEmbeddings()).fit(module, CaptionedImagesDataModule(icons, resolution=16))
