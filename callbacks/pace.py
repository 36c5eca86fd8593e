"""How fast a run is, and how long it will take."""

import sys
from collections import deque
from datetime import timedelta
from functools import partial
from math import ceil, inf, isinf
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lit_edm.batch import images_in
from lit_edm.callbacks.pictures import PictureCallback

FIRST_LINE = 5
"""Optimizer steps after which a run without a progress bar first tells its pace."""


class Pace(Callback):
    """Tells and logs seconds per optimizer step, images per second, and the time that is left.

    Every run of the command line has it. The progress bar shows all three; where nobody sees one, a line tells them
    after five steps and then after each tenth of the run. Loggers get pace/seconds_per_step, pace/images_per_second
    and pace/seconds_left every trainer.log_every_n_steps steps, as numbers of the first process's clock, without a word
    to the device or to other processes.

    Seconds per step are a mean over as many steps, waiting for data included, without what is not part of a step:
    validation, pictures and checkpoints. The time left is that of the steps that are left, each taking what steps have
    taken since training began, all of this included. Steps before a resume do not count; a run without an end has no
    time left. Images are those of all processes and of all batches of a step.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Has optimizers tell when they have stepped."""
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self._advance())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to measure, at the step that Lightning has just restored; joins the progress bar."""
        total = trainer.estimated_stepping_batches  # which makes no loaders: they are there by now
        self.total = total if total >= 0 else inf  # Lightning says -1 of data without a length
        self.first = self.step = trainer.global_step
        self.began = self.since = perf_counter()
        self.seconds, self.images, self.aside = 0.0, 0, True  # the first batch waits for workers to start
        self.window = max(1, trainer.log_every_n_steps)
        self.recent = deque[tuple[float, int]](maxlen=self.window)
        bar = trainer.progress_bar_callback
        self.seen = bar is not None and sys.stdout.isatty()
        if bar is not None:
            bar.get_metrics = partial(self.with_pace, bar)  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts the time since the last batch, which waited for this one, if it did nothing else."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        rendered = any(c.rendered_step == self.step for c in callbacks if isinstance(c, PictureCallback))
        self._advance(counts=not (self.aside or rendered))
        self.aside = False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the time of a batch that is not followed by an optimizer step."""
        self._advance()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that the time until the next batch is no step's."""
        self.aside = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes that the time until the next batch is no step's."""
        self.aside = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts images and, after an optimizer step, tells and logs the pace when it is time to."""
        self.images += images_in(batch, trainer.world_size) or 0
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        self.recent.append((self.seconds, self.images))
        self.seconds, self.images = 0.0, 0
        self.spent = perf_counter() - self.began
        if trainer._logger_connector.should_update_logs:
            values = {f"pace/{name}": torch.tensor(value) for name, value in self.pace().items()}
            pl_module.log_dict(values)  # as tensors, which stay where they are
        if not self.seen and self._is_time_for_a_line():
            total = "" if isinf(self.total) else f" of {self.total:,.0f}"
            pace = ", ".join(f"{value} {unit}" for unit, value in self.told().items())
            rank_zero_info(f"step {self.step:,}{total}: {pace}")

    def pace(self) -> dict[str, float]:
        """Returns seconds per step, images per second and seconds left, those that are known; after a step."""
        seconds, images = (sum(column) for column in zip(*self.recent, strict=True))
        values = {"seconds_per_step": seconds / len(self.recent)}
        if images and seconds:
            values["images_per_second"] = images / seconds
        if not isinf(self.total):
            values["seconds_left"] = max(0.0, self.total - self.step) * self.spent / (self.step - self.first)
        return values

    def told(self) -> dict[str, str]:
        """Returns the same for users, each by its unit."""
        values = self.pace()
        told = {"s/step": short(values["seconds_per_step"])}
        if "images_per_second" in values:
            told["images/s"] = short(values["images_per_second"])
        if "seconds_left" in values:
            told["left"] = str(timedelta(seconds=round(values["seconds_left"])))
        return told

    def with_pace(self, bar: ProgressBar, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Returns what a progress bar shows by itself, and the pace."""
        return {**type(bar).get_metrics(bar, trainer, module), **(self.told() if self.recent else {})}

    def _advance(self, counts: bool = True) -> None:
        """Goes on to the present, and counts the time since as that of a step unless it is of something else."""
        before, self.since = self.since, perf_counter()
        self.seconds += (self.since - before) * counts

    def _is_time_for_a_line(self) -> bool:
        every = 10 * self.window if isinf(self.total) else ceil(self.total / 10)
        return self.step - self.first == FIRST_LINE or self.step % every == 0


def short(value: float) -> str:
    """Returns a number in three digits, or in all of them before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
