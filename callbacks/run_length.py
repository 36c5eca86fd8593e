"""How long a run is, asked before training begins."""

from dataclasses import dataclass
from math import ceil, inf, isinf

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class RunLength:
    """Of a whole run, what is before a resume included; infinite where there is no end, or it is not known.

    Args:
        steps: Optimizer steps.
        batches: Batches of an epoch, on each process.
        accumulated: Batches of a step.
    """

    steps: float
    batches: float
    accumulated: int = 1

    @property
    def epochs(self) -> float:
        """Epochs, the last of which may not be a whole one."""
        if isinf(self.steps) or isinf(self.batches) or not self.batches:
            return inf
        return ceil(self.steps / ceil(self.batches / self.accumulated))


def optimizer_steps(trainer: Trainer) -> float:
    """Returns the optimizer steps of a whole run, infinite if it has no end; from a callback's on_fit_start on."""
    steps = trainer.estimated_stepping_batches
    forget_loader(trainer)
    return steps if steps >= 0 else inf  # Lightning says -1 of data without a length


def run_length(trainer: Trainer) -> RunLength:
    """Returns how long a run is, from a callback's on_fit_start on; all processes have to ask."""
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    return RunLength(optimizer_steps(trainer), batches, trainer.accumulate_grad_batches)


def forget_loader(trainer: Trainer) -> None:
    """Has a resumed run make its loader anew when training begins.

    Lightning counts batches with a loader that it keeps. But it tells loaders where they were only when it makes them,
    and knows that itself no earlier than after on_fit_start.
    """
    if trainer.ckpt_path is not None:
        trainer.fit_loop._combined_loader = None
