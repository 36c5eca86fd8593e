"""The pivot of pivotal tuning."""

import math

from lightning.pytorch import Callback, Trainer
from torch.optim import Optimizer

from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule


class FreezeEmbeddings(Callback):
    """Stops training the new tokens' embeddings after a fraction of all optimizer steps; the UNet goes on alone.

    Their gradients are dropped, which every optimizer takes as "leave alone": no movement, no decay, no share in
    the clipped norm. A learning rate of 0 does not stop Prodigy, whose momentum goes on, and requires_grad_(False)
    breaks DDP, which expects the same graph at every step.

    Args:
        ti_frac: Fraction of all optimizer steps that train the embeddings, in [0, 1].

    Raises:
        InputError: ti_frac is outside [0, 1], or the run has no last step to take a fraction of.
    """

    def __init__(self, ti_frac: float = 0.5) -> None:
        if not 0 <= ti_frac <= 1:
            raise InputError(f"FreezeEmbeddings.ti_frac is {ti_frac}; it is a fraction of all steps, in [0, 1]")
        self.ti_frac = ti_frac

    def on_train_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        """Counts the optimizer steps up to the pivot."""
        steps = trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise InputError("FreezeEmbeddings needs the run's length: set trainer.max_steps or trainer.max_epochs")
        self.pivot = self.ti_frac * steps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: SDXLModule, optimizer: Optimizer) -> None:
        """Drops the embeddings' gradients from the pivot on."""
        if trainer.global_step >= self.pivot:
            for parameter in pl_module.embedding_parameters():
                parameter.grad = None
