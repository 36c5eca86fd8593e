from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lit_edm.callbacks import SeamlessResume
from lit_edm.loggers import ResumableCSVLogger

Make = Callable[..., Any]


@pytest.mark.parametrize(("steps", "again"), [(5, True), (4, False)])
def test_the_end_of_a_run_is_kept_and_goes_on(
    pixels: Make, patches: Make, trainer: Make, tmp_path: Path, steps: int, again: bool
) -> None:
    """Also where it is no step to save at; the run of 7 steps ends in mid-epoch, like the others."""

    def fit(name: str, max_steps: int, ckpt_path: Path | None = None) -> tuple[Path, list[str]]:
        folder, saved = tmp_path / name, []
        keep = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
        run = trainer(SeamlessResume(), keep, max_steps=max_steps, enable_checkpointing=True)
        save = run.save_checkpoint
        run.save_checkpoint = lambda path, *a, **b: (saved.append(Path(path).name), save(path, *a, **b))
        run.fit(pixels(), patches(batch_size=2), ckpt_path=ckpt_path)
        return folder / "last.ckpt", saved

    (first, saved), (whole, _) = fit("first", steps), fit("whole", 7)
    assert saved.count("last.ckpt") == 2 + again
    rest, _ = fit("rest", 7, first)
    end, expected = (torch.load(path, weights_only=True) for path in (rest, whole))
    assert end["global_step"] == 7
    for name, value in expected["state_dict"].items():
        assert end["state_dict"][name].equal(value), name


def test_weights_alone_do_not_count_as_the_end(pixels: Make, patches: Make, trainer: Make, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True)
    weights = ModelCheckpoint(tmp_path / "weights", every_n_train_steps=1, save_weights_only=True)
    trainer(SeamlessResume(), keep, weights, max_steps=7, enable_checkpointing=True).fit(
        pixels(), patches(batch_size=2)
    )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 7


class BreaksOff(Callback):
    """Raises after a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            raise RuntimeError("broken off")


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_steps_are_logged_under_their_own_numbers(
    pixels: Make, patches: Make, trainer: Make, tmp_path: Path, batch: int
) -> None:
    """Also where the place goes back to the beginning of an epoch: four batches of two steps."""

    def fit(name: str, *callbacks: Callback, ckpt_path: Path | None = None) -> None:
        logger = ResumableCSVLogger(str(tmp_path), name, "")
        settings = {"max_steps": 6, "accumulate_grad_batches": 3, "log_every_n_steps": 1, "enable_checkpointing": True}
        run = trainer(*callbacks, SeamlessResume(), logger=logger, **settings)
        run.fit(pixels(), patches(batch_size=2), ckpt_path=ckpt_path)

    fit("whole", ModelCheckpoint(tmp_path / "kept"))
    with pytest.raises(RuntimeError, match="broken off"):
        fit("cut", BreaksOff(batch), OnExceptionCheckpoint(tmp_path / "cut", "cut"))
    fit("cut", ModelCheckpoint(tmp_path / "kept"), ckpt_path=tmp_path / "cut" / "cut.ckpt")
    assert (tmp_path / "cut/metrics.csv").read_text() == (tmp_path / "whole/metrics.csv").read_text()
