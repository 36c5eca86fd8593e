"""Samples of what a module of small images has learned so far."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

from lit_edm.batch import DescribesLabelledImages
from lit_edm.callbacks.pictures import PictureCallback
from lit_edm.callbacks.sheet import contact_sheet, log_pictures
from lit_edm.modules import EDMModule


class SampleSheet(PictureCallback):
    """Draws a sheet of samples, a class a row, before training, every few steps and at the end, from the same noise.

    Writes samples/step_<step>.png to the run's folder, and the sheet to loggers that take pictures.

    Args:
        every_n_steps: Optimizer steps between sheets; 0 draws them before and after training alone.
        samples: Samples of each class.
        num_steps: Steps of the sampler; the network is evaluated 2 num_steps - 1 times, twice that with guidance.
        guidance_scale: Strength of classifier-free guidance; 1 is none.
        side: Width and height in pixels at which each sample is shown.
        seed: Seed of the initial noise.
    """

    def __init__(
        self,
        every_n_steps: int = 0,
        samples: int = 8,
        num_steps: int = 18,
        guidance_scale: float = 1.0,
        side: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__("samples", every_n_steps)
        self.samples = samples
        self.num_steps = num_steps
        self.guidance_scale = guidance_scale
        self.side = side
        self.seed = seed
        self.titles = [""]

    def setup(self, trainer: Trainer, pl_module: EDMModule, stage: str) -> None:
        """Finds a title for each row: the names of the classes, where the data module knows them."""
        images = getattr(trainer, "datamodule", None)
        if pl_module.num_classes is not None:
            known = isinstance(images, DescribesLabelledImages)
            self.titles = images.class_names if known else [str(label) for label in range(pl_module.num_classes)]

    def render(self, module: EDMModule) -> Tensor:
        """Samples the images of all classes at once; returns pixels (classes * samples, C, H, W), about [-1, 1]."""
        label = torch.arange(module.num_classes or 1, device=module.device).repeat_interleave(self.samples)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(len(label), *module.image_shape, generator=generator).to(module.device)
        return module.sample(noise, label, self.num_steps, self.guidance_scale)

    def sheet(self, pictures: list[Image.Image]) -> Image.Image:
        """Lays the samples out, a class a row."""
        rows = {title: pictures[row * self.samples :][: self.samples] for row, title in enumerate(self.titles)}
        return contact_sheet(rows, [""] * self.samples, self.side, Image.Resampling.NEAREST)

    def save(self, pictures: list[Image.Image], folder: Path) -> None:
        """Writes the sheet of this step."""
        folder.mkdir(parents=True, exist_ok=True)
        self.sheet(pictures).save(folder / f"step_{self.rendered_step:06d}.png")

    def log_images(self, trainer: Trainer, pictures: list[Image.Image]) -> None:
        """Hands the sheet to loggers."""
        sheet = self.sheet(pictures)
        log_pictures(trainer.loggers, "samples", [sheet], [f"step {self.rendered_step}"], self.rendered_step)
