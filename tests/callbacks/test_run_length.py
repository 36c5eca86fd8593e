from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from lit_edm.callbacks import FreezeEmbeddings
from lit_edm.callbacks.run_length import RunLength, run_length
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.modules import SDXLModule
from lit_edm.sdxl import LoRA

Make = Callable[..., Any]


class Asks(Callback):
    """Asks before training how long it is."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.length = run_length(trainer)


@pytest.mark.parametrize(
    ("settings", "steps", "epochs"),
    [
        ({"max_steps": 5}, 5, 1),
        ({"max_steps": 20}, 20, 3),
        ({"max_steps": 20, "max_epochs": -1}, 20, 3),
        ({"max_steps": -1, "max_epochs": 2}, 16, 2),
        ({"max_steps": 5, "max_epochs": 2, "accumulate_grad_batches": 3}, 5, 2),
        ({"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 3}, 6, 2),
    ],
)
def test_steps_and_epochs(three_groups: Any, trainer: Make, settings: dict[str, Any], steps: int, epochs: int) -> None:
    asks = Asks()
    training = trainer(asks, **settings)
    training.fit(three_groups())
    assert (asks.length.steps, asks.length.batches, asks.length.epochs) == (steps, 8, epochs)
    assert training.global_step == steps


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.tensor([1.0, -2.0])


def test_data_without_a_length(three_groups: Any, trainer: Make) -> None:
    class Ends(Asks):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = True

    asks = Ends()
    trainer(asks, max_steps=-1, max_epochs=1).fit(three_groups(), DataLoader(Endless(), batch_size=4))
    assert asks.length == RunLength(inf, inf)
    assert asks.length.epochs == inf


@pytest.mark.parametrize("batch_size", [4, 5])
def test_a_resumed_run_still_hears_whether_its_place_is_the_same(
    tiny: Path, icons: Path, tmp_path: Path, trainer: Make, caplog: pytest.LogCaptureFixture, batch_size: int
) -> None:
    """Lightning tells loaders their place when it makes them, which to count batches it does before it knows it."""

    def run(batch_size: int, **settings: Any) -> Trainer:
        module = SDXLModule(str(tiny), tokens={"TOK": 1}, adapter=LoRA(rank=2))
        images = CaptionedImagesDataModule(icons, resolution=16, batch_size=batch_size)
        resume = settings.pop("ckpt_path", None)
        part = trainer(FreezeEmbeddings(0.5), Asks(), max_epochs=2, **settings)
        part.fit(module, images, ckpt_path=resume)
        return part

    run(4, max_steps=2).save_checkpoint(tmp_path / "last.ckpt")
    run(batch_size, max_steps=-1, ckpt_path=tmp_path / "last.ckpt")
    assert ("with other batch_size" in caplog.text) == (batch_size == 5)
