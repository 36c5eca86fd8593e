"""The average of the weights over training, which is what one samples from."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_edm.batch import images_in
from lit_edm.errors import InputError
from lit_edm.modules.sharding import placed_like, whole
from lit_edm.optim.shards import local


class ExponentialMovingAverage(Callback):
    """Averages what is trained, and only that, over the images seen (Karras et al. 2022, Appendix F.2).

    The average takes the place of the weights in validation, in pictures of this package's callbacks, and in the files
    of SaveAdapter; checkpoints keep both. An optimizer step with n images moves it towards the weights by a share
    1 - 0.5^(n / h), where the half-life h is at most rampup_ratio of the images seen before.

    Args:
        half_life: Images after which the share of an old value has halved, > 0.
        rampup_ratio: Greatest half-life as a share of the images seen, > 0; not limited if none.

    Raises:
        InputError: An argument is not positive.
    """

    def __init__(self, half_life: float = 500_000, rampup_ratio: float | None = 0.05) -> None:
        for key, value in {"half_life": half_life, "rampup_ratio": rampup_ratio}.items():
            if value is not None and not value > 0:
                raise InputError(f"ExponentialMovingAverage.{key} is {value}; it must be positive")
        self.half_life = half_life
        self.rampup_ratio = rampup_ratio
        self.average: dict[str, Tensor] = {}
        self.images_seen = 0
        self._images_in_step = 0
        self._live: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts from the weights as they are, or goes on with the average of a checkpoint."""
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                kept = self.average.get(name)
                self.average[name] = parameter.detach().clone() if kept is None else placed_like(kept, parameter)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the step, which Lightning restores only now."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts images and, after an optimizer step, moves the average."""
        self._images_in_step += images_in(batch, trainer.world_size)  # type: ignore[operator]  # who cannot tell fails
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._update(pl_module, self._images_in_step)
            self._images_in_step = 0

    @torch.no_grad()
    def _update(self, module: LightningModule, images: int) -> None:
        ramp = float("inf") if self.rampup_ratio is None else self.rampup_ratio * self.images_seen
        half_life = min(self.half_life, ramp)
        kept = 0.5 ** (images / half_life) if half_life > 0 else 0.0
        self.images_seen += images
        weights = dict(module.named_parameters())
        averages = [local(average) for average in self.average.values()]
        torch._foreach_lerp_(averages, [local(weights[name]) for name in self.average], 1 - kept)

    @contextmanager
    def averaged(self, module: LightningModule) -> Iterator[None]:
        """Lends a module the averaged weights, unless it has them on loan already."""
        if self._live:
            yield
            return
        self._swap_in(module)
        try:
            yield
        finally:
            self._swap_out(module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validates the average."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on with the weights, before checkpoints are written: Lightning runs those callbacks last."""
        self._swap_out(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves no average in the place of the weights, for those who save them now."""
        self._swap_out(pl_module)

    @torch.no_grad()
    def _swap_in(self, module: LightningModule) -> None:
        weights = dict(module.named_parameters())
        self._live = {name: weights[name].detach().clone() for name in self.average}
        for name, value in self.average.items():
            weights[name].copy_(value)

    @torch.no_grad()
    def _swap_out(self, module: LightningModule) -> None:
        weights = dict(module.named_parameters())
        for name, value in self._live.items():
            weights[name].copy_(value)
        self._live = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run goes on with."""
        return {"average": {n: whole(value) for n, value in self.average.items()}, "images_seen": self.images_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the average of a checkpoint, which is as it was after its last optimizer step."""
        self.average, self.images_seen = dict(state_dict["average"]), state_dict["images_seen"]


@contextmanager
def averaged(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Lends a module its averaged weights where the trainer averages them; changes nothing elsewhere."""
    with ExitStack() as stack:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ExponentialMovingAverage):
                stack.enter_context(callback.averaged(module))
        yield
