"""Time is what a clock of ours says, which what is done in a run moves on."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from lit_edm.callbacks import Pace, SampleSheet, SeamlessResume
from lit_edm.loggers import ResumableCSVLogger, read_rows
from lit_edm.modules import EDMModule

Make = Callable[..., Any]
WAIT, STEP = 0.25, 1.0


class Clock:
    """Moves on by fixed seconds when a batch is waited for or trained on, and by `aside` with all else that is slow."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step = STEP
        self.aside = 0.0

    def __call__(self) -> float:
        return self.now

    def during(self, method: Callable[..., Any], seconds: Callable[[], float]) -> Callable[..., Any]:
        """Has the time pass whenever a method is called."""

        def timed(*arguments: Any, **settings: Any) -> Any:
            self.now += seconds()
            return method(*arguments, **settings)

        return timed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("lit_edm.callbacks.pace.perf_counter", clock)
    slow = {
        (EDMModule, "training_step"): lambda: clock.step,
        (EDMModule, "on_before_batch_transfer"): lambda: WAIT * (torch.is_grad_enabled()),
        (EDMModule, "validation_step"): lambda: clock.aside,
        (SampleSheet, "render"): lambda: clock.aside,
        (TorchCheckpointIO, "save_checkpoint"): lambda: clock.aside,
    }
    for (owner, name), seconds in slow.items():
        monkeypatch.setattr(owner, name, clock.during(getattr(owner, name), seconds))
    return clock


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What users are told in lines of their own."""
    told: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("lightning.pytorch.utilities.rank_zero")
    handler.emit = lambda record: told.append(record.getMessage())
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


@pytest.fixture
def paces(pixels: Make, patches: Make, trainer: Make, tmp_path: Path) -> Callable[..., list[dict[str, float]]]:
    """Trains with Pace, on epochs of 3 + 3 + 1 images, and returns what is logged of it."""

    def fit(
        *callbacks: Callback, after: tuple[Callback, ...] = (), data: dict[str, Any] | None = None, **settings: Any
    ) -> list[dict[str, float]]:
        resume = settings.pop("ckpt_path", None)
        logger = ResumableCSVLogger(tmp_path, "", "")
        usual = {"logger": logger, "log_every_n_steps": 1, "max_steps": 6, "limit_val_batches": 0}
        run = trainer(*callbacks, Pace(), *after, SeamlessResume(), **usual | settings)
        run.fit(pixels(), patches(**data or {}), ckpt_path=resume)
        written = read_rows(tmp_path / "metrics.csv")
        rows = [{name.removeprefix("pace/"): float(value) for name, value in row.items()} for row in written]
        return [row for row in rows if "seconds_per_step" in row]

    return fit


def column(rows: list[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in rows]


def test_counts_waiting_and_training_of_each_step(clock: Clock, paces: Make) -> None:
    rows = paces()
    seconds = [STEP, *[WAIT + STEP] * 5]  # nobody knows for how long the first batch was waited for
    assert column(rows, "seconds_per_step") == seconds
    images = [3, 3, 1, 3, 3, 1]
    assert column(rows, "images_per_second") == pytest.approx([n / s for n, s in zip(images, seconds, strict=True)])
    whole = [(WAIT + STEP) * (6 - step) for step in range(1, 7)]
    assert column(rows, "seconds_left") == pytest.approx(whole)


def test_is_a_mean_over_the_steps_since_the_last_one(clock: Clock, paces: Make) -> None:
    """Of images and of seconds: groups of other sizes count for what they are."""
    rows = paces(log_every_n_steps=2)
    assert column(rows, "step") == [1, 3, 5]
    assert column(rows, "seconds_per_step") == [STEP + WAIT / 2, STEP + WAIT, STEP + WAIT]
    assert column(rows, "images_per_second") == pytest.approx([6 / 2.25, 4 / 2.5, 4 / 2.5])


def test_a_step_is_all_of_its_batches(clock: Clock, paces: Make) -> None:
    """An epoch's end closes a step: 3 + 3 images, then 1."""
    rows = paces(accumulate_grad_batches=2, max_steps=4)
    two, one = 2 * (WAIT + STEP), WAIT + STEP
    assert column(rows, "seconds_per_step") == [two - WAIT, one, two, one]
    assert column(rows, "images_per_second") == pytest.approx([6 / (two - WAIT), 1 / one, 6 / two, 1 / one])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_only_time_left_knows_of_what_is_no_step(
    clock: Clock, paces: Make, tmp_path: Path, accumulate: int, first: bool
) -> None:
    """Validation, pictures and checkpoints, some of them after every step; wherever the callback stands."""

    def fit() -> list[dict[str, float]]:
        sheet = SampleSheet(every_n_steps=2, samples=1, num_steps=1)
        keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3)
        order: dict[str, Any] = {"after": (sheet,)} if first else {}
        others = {"enable_checkpointing": True, "limit_val_batches": 1.0, "val_check_interval": 2}
        callbacks = [keep] if first else [sheet, keep]
        return paces(*callbacks, accumulate_grad_batches=accumulate, **order, **others)

    quick = fit()
    clock.aside = 100.0
    slow = fit()
    for name in ("step", "seconds_per_step", "images_per_second"):
        assert column(slow, name) == column(quick, name), name
    assert slow[-2]["seconds_left"] > quick[-2]["seconds_left"] + 50
    assert slow[-1]["seconds_left"] == 0


def test_steps_before_a_resume_do_not_count(
    clock: Clock, pixels: Make, patches: Make, trainer: Make, paces: Make, tmp_path: Path, lines: list[str]
) -> None:
    clock.step = 1000.0
    first = trainer(Pace(), max_steps=3)
    first.fit(pixels(), patches())
    first.save_checkpoint(tmp_path / "x.ckpt")
    assert "Pace" not in str(torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"])
    clock.step = STEP
    lines.clear()
    rows = paces(ckpt_path=tmp_path / "x.ckpt", log_every_n_steps=2, max_steps=8)
    assert column(rows, "step") == [3, 5, 7]
    assert column(rows, "seconds_per_step") == [STEP, STEP + WAIT, STEP + WAIT]
    assert column(rows, "seconds_left") == [4 * (STEP + WAIT), 2 * (STEP + WAIT), 0]
    told = [line for line in lines if line.startswith("step ")]
    assert told[0] == "step 4 of 8: 1 s/step, 3 images/s, 0:00:05 left"


class Stops(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 22


def test_a_run_without_end_has_no_time_left(clock: Clock, paces: Make, lines: list[str]) -> None:
    rows = paces(Stops(), max_steps=-1, max_epochs=-1)
    assert len(rows) == 22
    assert all("seconds_left" not in row for row in rows)
    told = [line for line in lines if line.startswith("step ")]
    assert [line.split(":")[0] for line in told] == ["step 5", "step 10", "step 20"]
    assert told[0] == "step 5: 1.25 s/step, 2.4 images/s"


def test_tells_after_five_steps_and_each_tenth(clock: Clock, paces: Make, lines: list[str]) -> None:
    paces(max_steps=32, log_every_n_steps=50)
    told = [line for line in lines if line.startswith("step ")]
    assert [int(line.split()[1]) for line in told] == [4, 5, *range(8, 33, 4)]
    assert told[-1].startswith("step 32 of 32: 1.24 s/step")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_shows_it(
    clock: Clock, paces: Make, lines: list[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    shown: list[dict[str, Any]] = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            assert trainer.progress_bar_callback is not None
            shown.append(trainer.progress_bar_callback.get_metrics(trainer, pl_module))

    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    paces(Looks(), enable_progress_bar=True)
    assert "s/step" not in shown[0]
    assert shown[2].keys() == {"train/loss", "s/step", "images/s", "left"}
    assert [shown[2][unit] for unit in ("s/step", "images/s", "left")] == ["1.25", "2.4", "0:00:05"]
    assert any(line.startswith("step ") for line in lines) != terminal


def test_images_are_those_of_all_processes(clock: Clock, paces: Make) -> None:
    """Seven images: four for each process, one of them twice, with weight 0."""
    rows = paces(data={"batch_size": 2}, strategy="ddp_fork", devices=2, max_steps=2)
    assert column(rows, "images_per_second") == pytest.approx([4 / STEP, 3 / (WAIT + STEP)])


def test_batches_of_others_have_no_images_to_count(three_groups: Any, trainer: Make, lines: list[str]) -> None:
    loader = DataLoader(torch.ones(8, 2), batch_size=4)  # type: ignore[arg-type]
    trainer(Pace(), max_steps=2).fit(three_groups(), loader)
    told = [line for line in lines if line.startswith("step ")]
    assert len(told) == 2
    assert all("images" not in line for line in told)
