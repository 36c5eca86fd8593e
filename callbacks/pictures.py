"""When pictures are rendered, whatever they show."""

from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from torch import Tensor

from lit_edm.callbacks.ema import averaged
from lit_edm.callbacks.sheet import to_pictures
from lit_edm.modules import DiffusionModule
from lit_edm.modules.sharding import unsharded


class PictureCallback(Callback, ABC):
    """Renders before training, every few steps and at the end, with averaged weights where there are such.

    Args:
        folder: Name of the pictures' folder in the run's folder.
        every_n_steps: Optimizer steps between renderings; 0 renders before and after training alone.
    """

    def __init__(self, folder: str, every_n_steps: int) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.rendered_step = -1

    @abstractmethod
    def render(self, module: Any) -> Tensor:
        """Returns pixels (B, C, H, W), about [-1, 1]; draws nothing from the global generator.

        May give up with SIGTERMException when the run is asked to end.
        """

    @abstractmethod
    def save(self, pictures: list[Image.Image], folder: Path) -> None:
        """Writes the pictures of this step to the folder."""

    @abstractmethod
    def log_images(self, trainer: Trainer, pictures: list[Image.Image]) -> None:
        """Hands the pictures of this step to loggers."""

    def on_train_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        """Renders what there is before training, or what a run that was asked to end had no time for."""
        if trainer.global_step == 0 or (self.is_due(trainer) and self.lacks_pictures(trainer)):
            self.write(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: DiffusionModule, *_: Any) -> None:
        """Renders after every n optimizer steps, once, however many batches a step accumulates."""
        if self.is_due(trainer):
            self.write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        """Renders the result."""
        self.write(trainer, pl_module)

    def write(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Renders on the first process and writes to files and loggers, once a step."""
        folder = self.folder_of(trainer)
        if trainer.global_step == self.rendered_step:
            return
        self.rendered_step = trainer.global_step
        with averaged(trainer, module), unsharded(module):
            if trainer.is_global_zero:
                with suppress(SIGTERMException):  # the others wait below, and all end together
                    with trainer.precision_plugin.forward_context():
                        pictures = to_pictures(self.render(module))
                    self.save(pictures, folder)
                    self.log_images(trainer, pictures)
        trainer.strategy.barrier(type(self).__name__)

    def is_due(self, trainer: Trainer) -> bool:
        """Tells whether pictures are to be rendered after this step."""
        return self.every_n_steps > 0 and trainer.global_step % self.every_n_steps == 0

    def lacks_pictures(self, trainer: Trainer) -> bool:
        """Tells whether there are none of this step."""
        folder = self.folder_of(trainer)
        return trainer.strategy.broadcast(not any(folder.glob(f"step_{trainer.global_step:06d}*")))

    def folder_of(self, trainer: Trainer) -> Path:
        """Returns the pictures' folder; all processes have to call this together, for log_dir makes them meet."""
        return Path(trainer.log_dir or trainer.default_root_dir) / self.folder
