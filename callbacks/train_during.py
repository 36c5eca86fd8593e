"""Phases: what is trained when."""

from collections.abc import Collection, Mapping, Sequence
from math import ceil, isinf
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from torch.optim import Optimizer

from lit_edm.callbacks.run_length import optimizer_steps
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule

Group = Literal["unet", "text_encoders", "embeddings"]


class TrainDuring(Callback):
    """Trains a group of parameters during a part of the run's optimizer steps, and leaves it as it is in all others.

    Where several of one group are in a trainer, it is trained while any of them says so. Outside, its gradients are
    dropped, which every optimizer takes as "leave alone": no movement, no decay, no share in the clipped norm. A
    learning rate of 0 does not stop Prodigy, whose momentum goes on, and requires_grad_(False) breaks DDP, which
    expects the same graph at every step. The module is told too, and saves what work it can.

    Args:
        group: What is trained: unet, text_encoders or embeddings, the new tokens'.
        start: First step to train it; up to 1 a fraction of all optimizer steps, above 1 a number of them.
        stop: The step from which it is left alone, likewise.

    Raises:
        InputError: start is negative or not before stop, the run has no last step to take a fraction of, or the module
            does not train the group.
    """

    def __init__(self, group: Group, start: float = 0.0, stop: float = 1.0) -> None:
        self.group = group
        self.start = start
        self.stop = stop
        same_unit = (start > 1) == (stop > 1)
        if not start >= 0 or not stop > 0 or (same_unit and start >= stop):
            raise InputError(f"TrainDuring trains {group} from {start} to {stop}; start must be 0 or more, below stop")

    def setup(self, trainer: Trainer, pl_module: SDXLModule, stage: str) -> None:
        """Checks that the group is trained, before weights are loaded, if the module can tell by then."""
        if stage == "fit" and hasattr(pl_module, "trained_groups"):
            self.check_group(pl_module.trained_groups())

    def on_fit_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        """Counts the optimizer steps up to start and stop, and checks them before images are encoded or rendered."""
        groups = getattr(pl_module, "parameter_groups", dict)()
        self.check_group(groups)
        total = optimizer_steps(trainer)
        if isinf(total) and any(0 < moment < 1 for moment in (self.start, self.stop)):
            raise InputError(
                f"{type(self).__name__} needs the run's length: set trainer.max_steps or trainer.max_epochs"
            )
        self.first, self.end = self.span(total)
        if self.first > 0 and (isinf(self.first) or ceil(self.first) >= min(self.end, total)):
            raise InputError(
                f"TrainDuring never trains {self.group}: {self.start} to {self.stop} is from step {self.first:g} to "
                f"{self.end:g} of {total}"
            )
        spans = {group: [phase.span(total) for phase in phases_of(trainer, group)] for group in groups}
        if (step := first_step_without(spans, total)) is not None:
            raise InputError(
                f"{type(self).__name__}: step {step} of {total} would train none of {', '.join(groups)}; let the "
                "phases overlap, or end the run there"
            )

    def check_group(self, groups: Collection[str]) -> None:
        """Raises InputError if the group is not among those that are trained."""
        if self.group not in groups:
            trained = ", ".join(groups) or "no groups"
            raise InputError(
                f"{type(self).__name__} is about {self.group}, but the model trains {trained}; leave the callback out, "
                f"or let the model train {self.group}"
            )

    def span(self, total: float) -> tuple[float, float]:
        """Returns the first step of a run of this length to train the group, and the first one after."""
        first, end = (moment * total if 0 < moment <= 1 else moment for moment in (self.start, self.stop))
        return first, end

    def on_train_batch_start(self, trainer: Trainer, pl_module: SDXLModule, batch: Any, batch_idx: int) -> None:
        """Tells the module whether the group is trained in this step."""
        pl_module.set_trained(self.group, self.trains(trainer))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: SDXLModule, optimizer: Optimizer) -> None:
        """Drops the group's gradients, before Lightning clips their norm, in steps that do not train it."""
        if not self.trains(trainer):
            for parameter in pl_module.parameter_groups()[self.group]:
                parameter.grad = None

    def trains(self, trainer: Trainer) -> bool:
        """Tells whether this step trains the group: a function of the step alone, so that a resumed run goes on."""
        return any(phase.first <= trainer.global_step < phase.end for phase in phases_of(trainer, self.group))


def phases_of(trainer: Trainer, group: str) -> list[TrainDuring]:
    """Returns a trainer's callbacks that say when a group is trained."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [phase for phase in callbacks if isinstance(phase, TrainDuring) and phase.group == group]


def first_step_without(spans: Mapping[str, Sequence[tuple[float, float]]], total: float) -> int | None:
    """Returns the first step in which no group is trained, if there is one.

    Args:
        spans: First and last moment of each group's phases; a group without any is always trained.
        total: Steps of the run.
    """
    moments = {0.0, *(moment for of_group in spans.values() for span in of_group for moment in span)}
    for step in sorted(ceil(moment) for moment in moments if not isinf(moment) and ceil(moment) < total):
        if not any(not of_group or any(a <= step < b for a, b in of_group) for of_group in spans.values()):
            return step
    return None
