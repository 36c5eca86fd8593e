"""Steps that would break the weights are skipped, and a run that has many of them ends."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from math import nan
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_edm.callbacks.non_finite import Seen, circumstances, describe, moment, remedy, way_back
from lit_edm.callbacks.train_during import TrainDuring
from lit_edm.errors import InputError
from lit_edm.modules.sharding import total_norm
from lit_edm.optim import effective_rates

logger = logging.getLogger(__name__)


class SkipNonFinite(Callback):
    """Skips optimizer steps whose loss or gradient is NaN or infinite, and ends a run that has many of them.

    Such a step moves no parameter and no state of the optimizer. It counts as a step all the same: learning rate
    schedules and phases go on, and an average moves towards weights that stay as they are. One such batch is
    enough, be it one of several that are accumulated or that of one process among several, and all processes decide
    alike. Each such step is warned about, and counted in the metric train/skipped_steps.

    With trainer.precision 16-mixed, gradients of a finite loss overflow now and then until the scale of the loss fits.
    That is left to the scaler, and counts only once it has no scale left to lower.

    A step costs the norm of all gradients and one wait for the device, after which everything is decided on the host.

    Args:
        limit: Most steps of the last `window` that may be skipped before the run ends, >= 0.
        window: Optimizer steps that are looked back on, above limit.

    Raises:
        InputError: limit or window is out of its range, more than limit steps were skipped, or a weight is NaN or
            infinite already, at the start or by other hands, which no step can mend.
    """

    def __init__(self, limit: int = 10, window: int = 100) -> None:
        if not 0 <= limit < window:
            raise InputError(f"SkipNonFinite: {limit=}, {window=}; limit must be 0 or more, below window")
        self.limit = limit
        self.window = window
        self.count = 0
        self.recent: list[int] = []
        self._last_loss: Tensor | float = nan
        self._shown: Sequence[str] = ()
        self._losses: list[Tensor] = []
        self._captions: list[Sequence[str]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at every weight, also those that a checkpoint has just restored."""
        if (name := broken_weight(pl_module)) is not None:
            raise InputError(
                f"the weight {name} is NaN or infinite before the first step: go on from an older checkpoint "
                "(--ckpt_path), or load the base's weights anew"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the captions, to say later which were concerned."""
        self._shown = batch.get("caption", ()) if isinstance(batch, Mapping) else ()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Makes the gradient of a loss that is not finite NaN, which it need not be of itself.

        So it reaches the sum over batches and processes, which is the same on all of these.
        """
        value = loss.detach()
        self._losses.append(value)
        self._captions.append(self._shown)
        loss.register_hook(lambda gradient: gradient + 0 * value)  # 0 times a finite value changes no bit

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drops all gradients if one is not finite, before Lightning clips their norm."""
        if not total_norm(gradients(optimizer, resting(trainer, pl_module))).isfinite():  # waits for the device
            self._skip(trainer, pl_module, optimizer)
        self._losses, self._captions = [], []
        pl_module.log("train/skipped_steps", torch.tensor(float(self.count)))  # which stays on the host

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the loss if it is finite, without a look at it."""
        if isinstance(outputs, Mapping) and "loss" in outputs:
            loss = outputs["loss"] * trainer.accumulate_grad_batches  # of which Lightning took a share
            self._last_loss = torch.where(loss.isfinite(), loss, self._last_loss)

    def _skip(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        own = Seen([float(loss) for loss in self._losses], self._captions, float(self._last_loss))
        seen = of_all_processes(own, trainer)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and scaler.get_scale() > 1 and all(each.is_finite for each in seen):
            return
        cause = describe(seen, broken_groups(optimizer, resting(trainer, module)))
        if scaler is None:  # one that is there makes no step of such gradients, and expects to find them
            drop_gradients(optimizer)
        self.count += 1
        self.recent = [step for step in self.recent if step > trainer.global_step - self.window] + [trainer.global_step]
        if (name := broken_weight(module)) is not None:
            raise InputError(
                f"the weight {name} is NaN or infinite {moment(trainer)}, in which {cause}: go on from a checkpoint of "
                "before (--ckpt_path)"
            )
        if len(self.recent) > self.limit:
            raise InputError(self._why_it_ends(trainer, optimizer, cause, seen[0].last_loss))
        if trainer.is_global_zero:
            logger.warning("skipped the optimizer step %s, %s: %s", moment(trainer), self._how_many(), cause)

    def _how_many(self) -> str:
        return f"{len(self.recent)} of the last {self.window}"

    def _why_it_ends(self, trainer: Trainer, optimizer: Optimizer, cause: str, last_loss: float) -> str:
        return (
            f"{self._how_many()} optimizer steps were skipped, at last that {moment(trainer)}, in which {cause}; "
            f"{circumstances(trainer, optimizer, last_loss)}: {remedy(trainer)}; {way_back(trainer)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run goes on with."""
        return {"count": self.count, "recent": self.recent, "last_loss": float(self._last_loss)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting where a checkpoint was."""
        self.count, self.recent = state_dict["count"], list(state_dict["recent"])
        self._last_loss = state_dict["last_loss"]


def resting(trainer: Trainer, module: LightningModule) -> set[nn.Parameter]:
    """Returns the parameters that a phase leaves alone in this step, and whose gradients are of no matter.

    They may be dropped already or not, as callbacks stand.
    """
    phases = [phase for phase in trainer.callbacks if isinstance(phase, TrainDuring)]  # type: ignore[attr-defined]
    groups = {phase.group for phase in phases if not phase.trains(trainer)}
    return {parameter for group in groups for parameter in module.parameter_groups()[group]}  # type: ignore[operator]


def gradients(optimizer: Optimizer, without: set[nn.Parameter]) -> list[Tensor]:
    """Returns the gradients that an optimizer is about to step with."""
    return [gradient for group in optimizer.param_groups for gradient in gradients_of(group["params"], without)]


def gradients_of(parameters: Iterable[nn.Parameter], without: set[nn.Parameter]) -> list[Tensor]:
    """Returns the gradients of parameters that have one and are not among others."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None and parameter not in without]


def whole(value: Tensor) -> Tensor:
    """Returns a value in full where each process holds a part of it, as FSDP's do."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[operator]


def drop_gradients(optimizer: Optimizer) -> None:
    """Leaves no gradient, which every optimizer takes as "leave alone"; zeros would let momentum go on."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def broken_groups(optimizer: Optimizer, without: set[nn.Parameter]) -> list[str]:
    """Returns the names of the parameter groups whose gradients are not finite."""
    norms = [total_norm(gradients_of(group["params"], without)) for group in optimizer.param_groups]
    return [name for name, norm in zip(effective_rates(optimizer), norms, strict=True) if not norm.isfinite()]


def broken_weight(module: nn.Module) -> str | None:
    """Returns the name of the first parameter, trained or not, with an entry that is not finite, if there is one."""
    return next((name for name, weight in module.named_parameters() if not whole(weight.isfinite().all())), None)


def of_all_processes(seen: Seen, trainer: Trainer) -> list[Seen]:
    """Returns what every process saw, in their order. All of them ask: their gradients are the same."""
    every = [seen] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(every, seen)
    return every
