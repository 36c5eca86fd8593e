from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

from lit_edm.batch import LabelledBatch
from lit_edm.data import DigitsDataModule, Draw, EpochBatches
from lit_edm.data.labelled import Drawn
from lit_edm.errors import InputError

Make = Callable[..., Any]


class Recorder(LightningModule):
    """Trains nothing; keeps the images of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        self.seen.append(batch["image"])

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        """Nothing is validated either."""

    def configure_optimizers(self) -> None:
        return None


def set_up(**settings: Any) -> DigitsDataModule:
    data = DigitsDataModule(**settings)
    data.setup("fit")
    return data


def indices(data: DigitsDataModule) -> tuple[list[int], list[int]]:
    return list(data.train_set.indices), list(data.val_set.indices)


def test_every_image_is_trained_on_or_held_out() -> None:
    trained, held_out = indices(set_up(held_out=0.3))
    assert len(held_out) == round(0.3 * 1797)
    assert sorted(trained + held_out) == list(range(1797))


def test_the_split_follows_from_its_seed_alone() -> None:
    torch.manual_seed(1)
    first = indices(set_up())
    torch.manual_seed(2)
    assert indices(set_up(batch_size=3)) == first
    assert indices(set_up(seed=1)) != first


def test_loaders_shuffle_what_is_trained_on_alone() -> None:
    data = set_up(num_workers=1)
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, EpochBatches)
    assert loader.persistent_workers
    assert isinstance(data.val_dataloader().sampler, SequentialSampler)  # type: ignore[union-attr]
    labels = torch.cat([batch["label"] for batch in set_up(batch_size=100).val_dataloader()])
    assert labels.tolist() == [data.val_set[index]["label"] for index in range(359)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_goes_on_with_the_batch_that_was_next(
    patches: Make, trainer: Make, tmp_path: Path, num_workers: int
) -> None:
    def run(steps: int, **settings: Any) -> list[Tensor]:
        recorder = Recorder()
        keep = ModelCheckpoint(tmp_path / f"{steps}", save_last=True, every_n_train_steps=1)
        run = trainer(keep, max_steps=steps, enable_checkpointing=True, num_sanity_val_steps=0)
        run.fit(recorder, patches(held_out=0.0, num_workers=num_workers), **settings)
        return recorder.seen

    whole, begun = run(10), run(6)  # of epochs of four batches
    assert len({tuple(batch.flatten().tolist()) for batch in whole}) == 10
    resumed = run(10, ckpt_path=tmp_path / "6" / "last.ckpt")
    assert [len(batch) for batch in whole] == [3, 3, 3, 2] * 2 + [3, 3]
    assert all(one.equal(other) for one, other in zip(whole, begun + resumed, strict=True))


def test_draws_leave_the_state_of_torch_as_it_is() -> None:
    class Random(Dataset[Any]):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": torch.rand(1, 2, 2), "label": index}

    before = torch.get_rng_state()
    batch = Drawn(Random())[[Draw(4, 1, 1.0), Draw(5, 2, 1.0), Draw(4, 1, 1.0)]]
    assert before.equal(torch.get_rng_state())
    assert batch["label"].tolist() == [4, 5, 4]
    assert batch["image"][0].equal(batch["image"][2])
    assert not batch["image"][0].equal(batch["image"][1])


def test_nothing_held_out() -> None:
    assert set_up(held_out=0.0).val_dataloader() == []


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_share_outside_its_range(share: float) -> None:
    with pytest.raises(InputError, match=r"data\.init_args\.held_out is .*: give a share in \[0, 1\)"):
        set_up(held_out=share)


@pytest.mark.parametrize(("key", "value", "least"), [("batch_size", 0, 1), ("num_workers", -1, 0), ("seed", -1, 0)])
def test_numbers_too_small(key: str, value: int, least: int) -> None:
    with pytest.raises(InputError, match=rf"data\.init_args\.{key} is {value}: give at least {least}"):
        set_up(**{key: value})
