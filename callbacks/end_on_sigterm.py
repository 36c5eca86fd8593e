"""Runs that are asked to end save what they have and do so."""

import atexit
import os
import signal
from contextlib import suppress
from subprocess import Popen, TimeoutExpired
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_edm.checkpoints import save_last
from lit_edm.errors import InputError

GRACE = 10.0
"""Seconds that processes have to end by themselves once the one that has started them has failed."""


class EndOnSigterm(Callback):
    """Saves last.ckpt and ends the run when SIGTERM asks for it, as clusters do before they take a machine away.

    Every run of the command line has it, after all callbacks of the config. The run ends after the batch it is at, or
    before the next batch of a validation, which is done anew after a resume; after its last step it comes to its end.
    ModelCheckpoint.save_on_exception is no substitute: an error or Ctrl-C may come in the middle of a step, and what is
    saved then is no state a run was ever in, one file each time.

    Several processes agree on it after each batch: the signal may come to any of them, and a second one does no harm.
    Before training there is nothing to save, and in other subcommands neither: processes end at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self.has_trained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts handlers in place of Lightning's, which talks to other processes whatever they are waiting for."""
        self.trainer = trainer
        if trainer.world_size > 1 and any(getattr(k, "save_on_exception", False) for k in trainer.checkpoint_callbacks):
            raise InputError(
                "ModelCheckpoint.save_on_exception must be false where there are several processes: one that fails "
                "would wait to save with the others, and these for its next step"
            )
        connector = trainer._signal_connector
        connector._sigterm_notifier_fn = self.ask if stage == "fit" else self.end_at_once  # type: ignore[method-assign]
        if getattr(trainer.strategy.launcher, "procs", None):  # which would go on alone
            connector._register_signal(signal.SIGTERM, self.end_at_once)

    def ask(self, signum: int, frame: Any) -> None:
        """Notes in a signal handler that the run is to end, and tells the processes that this one has started."""
        if not self.asked:
            self.asked = True
            self._pass_on(signum)

    def end_at_once(self, signum: int, frame: Any) -> None:
        """Ends this process and those that it has started, unless Lightning, which calls both, has asked before."""
        if not self.asked:
            self._pass_on(signum)
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def _pass_on(self, signum: int) -> None:
        if self.trainer.strategy.launcher is not None:
            self.trainer.strategy.launcher.kill(signum)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a run that has nothing to save yet."""
        if self.all_asked(trainer):
            raise SIGTERMException

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends after a batch, when callbacks are done with it."""
        self.has_trained = True
        if not self.all_asked(trainer):
            return
        if has_all_steps(trainer):
            save_last(trainer)  # a resumed run would do nothing of what is left
            return
        for keeper in trainer.checkpoint_callbacks:  # whose turn it would be
            keeper.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        raise SIGTERMException

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Ends before a batch of held-out images."""
        if self.all_asked(trainer) and not has_all_steps(trainer):
            raise SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves what there is if SIGTERM is why the run ends, to the folder of the first ModelCheckpoint.

        Processes that this one has started end with it, whatever the reason, also those that hang.
        """
        for process in getattr(trainer.strategy.launcher, "procs", ()):
            if isinstance(process, Popen):  # forks are ended by whoever has made them
                atexit.register(end, process)  # once it has been said what went wrong
        if not isinstance(exception, SIGTERMException) or not self.has_trained:
            return
        if (path := save_last(trainer)) is None:
            rank_zero_info(f"SIGTERM: the run ends at step {trainer.global_step}, and no ModelCheckpoint keeps it")
        else:
            rank_zero_info(f"SIGTERM: step {trainer.global_step} is saved in {path}; go on with --ckpt_path last")

    def all_asked(self, trainer: Trainer) -> bool:
        """Tells whether any process has been asked to end; all of them have to call this together."""
        return trainer.strategy.reduce_boolean_decision(self.asked, all=False)


def has_all_steps(trainer: Trainer) -> bool:
    """Tells whether a run has made the last of its steps, so that it ends by itself."""
    return 0 <= trainer.max_steps <= trainer.global_step


def end_if_asked(module: LightningModule) -> None:
    """Raises SIGTERMException if this process has been asked to end, which others need not know yet."""
    trainer = module._trainer
    if trainer is not None:
        enders = [callback for callback in trainer.callbacks if isinstance(callback, EndOnSigterm)]  # type: ignore[attr-defined]
        if trainer.received_sigterm or any(ender.asked for ender in enders):
            raise SIGTERMException


def end(process: Popen[bytes]) -> None:
    """Waits a while for a process, and kills it if it has not ended then."""
    with suppress(TimeoutExpired):
        process.wait(GRACE)
    process.kill()
