"""Resumed runs that log and validate as if they had never stopped."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_edm.checkpoints import save_last
from lit_edm.loggers import ResumableCSVLogger


class SeamlessResume(Callback):
    """Lets a resumed run log and validate what a run that never stopped does: nothing left out, nothing twice.

    And lets a run that has ended be one that can be resumed, with more steps: its end is saved in last.ckpt.

    Every run of the command line has it. Weights, optimizer and batches of a resumed run need none of this.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells ResumableCSVLogger which step a resumed run goes on with."""
        if trainer.ckpt_path is None:
            return
        for logger in trainer.loggers:
            if isinstance(logger, ResumableCSVLogger):
                logger.go_on_from(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Has steps logged under their own numbers: Lightning, resumed at some places, counts one too many."""
        if trainer.ckpt_path is not None:
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the end of the run too, where the last steps are fewer than those between two checkpoints."""
        keepers = [keeper for keeper in trainer.checkpoint_callbacks if not getattr(keeper, "save_weights_only", False)]
        saved = [getattr(keeper, "_last_global_step_saved", 0) for keeper in keepers]
        if trainer.global_step > max(saved, default=trainer.global_step):
            save_last(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Has a step logged before its checkpoint is there, and a validation that is due after it done on resuming.

        Lightning would log the step right after it saves: a run that is killed in between would lose the row. And it
        takes a validation for done that has not begun, or goes on in its middle, where what was summed up is gone.
        """
        fit = checkpoint["loops"]["fit_loop"]
        batches, validation = fit["epoch_loop.batch_progress"], fit["epoch_loop.val_loop.batch_progress"]
        if trainer.training and batches["total"]["processed"] == batches["total"]["completed"] + 1:  # as a batch ends
            trainer._logger_connector.update_train_step_metrics()
            if validates_now(trainer):
                for counts in (batches["total"], batches["current"]):
                    counts["completed"] += 1
                begin_validation(validation)
        elif trainer.validating and validation["current"]["ready"] != validation["current"]["completed"]:
            begin_validation(validation)


def validates_now(trainer: Trainer) -> bool:
    """Tells whether a validation follows the batch that a trainer is at, by a count of batches rather than by time."""
    loop = trainer.fit_loop
    by_time = getattr(trainer, "_val_check_time_interval", None) is not None
    return not by_time and loop._data_fetcher is not None and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def begin_validation(progress: dict[str, Any]) -> None:
    """Makes a state of the validation's progress that of its first batch, which Lightning goes back to and does."""
    done = progress["total"]["completed"] - progress["current"]["completed"]
    progress["total"].update(ready=done + 1, started=done + 1, processed=done, completed=done)
    progress["current"].update(ready=1, started=1, processed=0, completed=0)
    progress["is_last_batch"] = False
