"""What training modules share: the interface that callbacks know, the optimizer, and reproducible steps."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_edm.edm import Denoise, DiffusionLoss
from lit_edm.edm.draws import Share, sharing
from lit_edm.errors import InputError
from lit_edm.modules.position import go_on_from_last_step
from lit_edm.optim import effective_rates, rate_warning
from lit_edm.seeds import run_seed, seed_all, seed_of

NETWORK_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Precision that networks compute in by the trainer's. Every trainable value is float32 throughout."""

SETTINGS = ("lr", "weight_decay", "betas", "eps", "momentum", "d_coef", "growth_rate")
"""What of an optimizer's groups is a setting and not, as Prodigy's d is, a state."""


class DiffusionModule(LightningModule, ABC):
    """Trains a denoiser D(x; sigma) of clean latents y.

    Args:
        loss: Scores the denoiser on a batch of clean latents.
        optimizer: Creates the optimizer from parameter groups; AdamW at 1e-4 if not given.
        lr_scheduler: Creates the learning rate schedule, stepped every optimizer step.
    """

    def __init__(
        self, loss: DiffusionLoss, optimizer: OptimizerCallable | None, lr_scheduler: LRSchedulerCallable | None
    ) -> None:
        super().__init__()
        self.loss = loss
        self.loss_parts = nn.ModuleList(loss.stateful_parts())
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self._observed: dict[str, Tensor] = {}  # what parts of the loss had learned from losses before this step

    @abstractmethod
    def encode(self, batch: Any) -> Tensor:
        """Returns the clean latents (B, C, H, W) of a batch, float32; may draw from the global generator."""

    @abstractmethod
    def denoise(self, batch: Any) -> Denoise:
        """Returns D(x; sigma) given all that a batch says of its images."""

    @abstractmethod
    def denoise_unconditionally(self, batch: Any) -> Denoise:
        """Returns D(x; sigma) without caption or class, for classifier-free guidance."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Returns the pixels, about [-1, 1], of latents (B, C, H, W)."""

    @property
    @abstractmethod
    def sigma_range(self) -> tuple[float, float]:
        """The smallest and the largest noise level to sample from."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Leaves it to callbacks such as ValidationLoss: Lightning validates only modules that have this method."""

    def make_optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Creates the optimizer of named parameter groups and, without weight decay, of the loss's own parameters."""
        if parts := trainable(self.loss_parts):
            groups = [*groups, {"name": "loss", "params": parts, "weight_decay": 0.0}]
        optimizer = self.optimizer(groups) if self.optimizer else torch.optim.AdamW(groups, lr=1e-4, fused=True)
        if warning := rate_warning(optimizer):
            rank_zero_warn(warning)
        self._given = [{key: group[key] for key in SETTINGS if key in group} for group in optimizer.param_groups]
        return optimizer

    def with_schedule(self, optimizer: Optimizer) -> OptimizerLRScheduler:
        """Adds the learning rate schedule, stepped every optimizer step, if there is one."""
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    def on_train_start(self) -> None:
        """Gives the optimizer of a resumed run the config's settings, in place of those in the checkpoint.

        Learning rates under a schedule are left to it: it goes on where it was.
        """
        if self.trainer.ckpt_path is None:
            return
        for group, given in zip(self.trainer.optimizers[0].param_groups, self._given, strict=True):
            group.update({key: value for key, value in given.items() if key != "lr" or self.lr_scheduler is None})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Makes every random number of a step a function of (seed, step, rank): a resumed run draws what it would have.

        What a network drops out, say, is a process's own; what `sharing` is about follows from (seed, step, row) alone.
        """
        seed_all(self._seed_of_step(self.global_rank + 1 if self.processes > 1 else 0))
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            kept = self.loss_parts.state_dict(prefix="loss_parts.")
            self._observed = {name: value.clone() for name, value in kept.items()}

    def _seed_of_step(self, stream: int = 0) -> int:
        return seed_of(run_seed(), self.trainer.fit_loop.epoch_loop.total_batch_idx, stream)

    def sharing(self, batch: Any, rows: int) -> AbstractContextManager[None]:
        """Lets processes draw for their rows of a batch what one process alone would draw for all of them."""
        if self.processes == 1:
            return nullcontext()
        total = batch.get("images", rows * self.processes)
        return sharing(Share(self._seed_of_step(), self.global_rank * rows, total))

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return 1 if self._trainer is None else self.trainer.world_size

    def log_loss(self, loss: Tensor, rows: int) -> None:
        """Logs the loss of a batch as train/loss, the mean over processes where there are several."""
        self.log("train/loss", loss, batch_size=rows, sync_dist=self.processes > 1)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the learning rate of each parameter group; Prodigy's with what it has found so far, d times lr."""
        # As tensors, wherever they are: a number Lightning would copy to the device, and the host would wait for it.
        self.log_dict({f"rate/{name}": torch.as_tensor(rate) for name, rate in effective_rates(optimizer).items()})

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Shows the loss in the progress bar, in steps that are written to the logs: to look at it is to wait for it.

        With Lightning's prog_bar the host would look after each batch.
        """
        if self.trainer._logger_connector.should_update_logs:
            metrics = self.trainer.callback_metrics
            self.trainer.progress_bar_metrics["train/loss"] = float(metrics["train/loss"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Says where the run goes on, and drops the arguments of a module that was built in Python.

        They are objects, which weights-only loading refuses, and who loads such a checkpoint gives them again. Those of
        the command line are a plain config, and stay.
        """
        if go_on_from_last_step(checkpoint["loops"]["fit_loop"], self.trainer.accumulate_grad_batches):
            checkpoint["state_dict"].update(self._observed)
        if not self.built_from_config():
            checkpoint.pop(self.CHECKPOINT_HYPER_PARAMS_KEY, None)

    def built_from_config(self) -> bool:
        """Tells whether the command line built this module, whose hyperparameters are the config's plain text then."""
        return "_instantiator" in self.hparams

    def network_dtype(self) -> torch.dtype:
        """Returns the precision that networks compute in, by the trainer's.

        Raises:
            InputError: The trainer's precision would hold trainable values in less than float32.
        """
        precision = "32-true" if self._trainer is None else str(self.trainer.precision)
        if precision not in NETWORK_DTYPES:
            raise InputError(
                f"trainer.precision is {precision}; use one of {', '.join(NETWORK_DTYPES)}: networks compute in half "
                "precision then, and what is trained stays float32"
            )
        return NETWORK_DTYPES[precision]


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that require a gradient."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module in eval mode and, after, each of its parts back in its own."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
