"""Pictures of what the module has learned so far."""

from functools import partial
from math import inf
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

from lit_edm.callbacks.end_on_sigterm import end_if_asked
from lit_edm.callbacks.pictures import PictureCallback
from lit_edm.callbacks.sheet import contact_sheet, log_pictures
from lit_edm.edm import HeunSampler, Sampler
from lit_edm.errors import InputError
from lit_edm.files import write_whole
from lit_edm.modules import SDXLModule
from lit_edm.modules.prior import blank_batch
from lit_edm.sdxl.latents import vae_factor
from lit_edm.sdxl.schedulers import DiffusersSampler, for_base


class ValidationImages(PictureCallback):
    """Renders prompts before training, every few steps and at the end, always from the same noise.

    Samples over the noise levels that the base knows. Writes images/step_<step>/<prompt>.png and
    images/before_after.png to the run's folder, and the pictures to loggers that take them.

    Args:
        prompts: Captions to render; placeholders are replaced as in training.
        every_n_steps: Optimizer steps between renderings; 0 renders before and after training alone.
        resolution: Side of the square pictures in pixels.
        sampler: Makes pictures of noise; HeunSampler if not given, Algorithm 1 of Karras et al. (2022) in 20 steps.
        guidance_scale: Strength of classifier-free guidance; 1 is none.
        guidance_interval: Noise levels above and up to which there is guidance, [low, high]; all if not given.
        seed: Seed of all noise.

    Raises:
        InputError: There is no prompt, or no noise level within the guidance interval.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_steps: int = 0,
        resolution: int = 1024,
        sampler: Sampler | None = None,  # a default's num_steps would stay behind when YAML names another class
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] | None = None,
        seed: int = 0,
    ) -> None:
        if not prompts:
            raise InputError("ValidationImages.prompts is empty; write a prompt, or remove the callback")
        if guidance_interval is not None and not 0 <= guidance_interval[0] < guidance_interval[1]:
            raise InputError(f"ValidationImages.guidance_interval is {guidance_interval}; it must be 0 <= low < high")
        super().__init__("images", every_n_steps)
        self.prompts = prompts
        self.resolution = resolution
        self.sampler = sampler or HeunSampler()
        self.guidance_scale = guidance_scale
        self.guidance_interval = guidance_interval or (0.0, inf)
        self.seed = seed
        self.pictures: list[Path] = []

    def setup(self, trainer: Trainer, pl_module: SDXLModule, stage: str) -> None:
        """Checks that the base can render such pictures, before its weights are loaded.

        Raises:
            InputError: The resolution does not divide into whole latents, or the sampler is for another kind of base.
        """
        factor = vae_factor(pl_module.checkpoint.vae_config())
        if self.resolution < 1 or self.resolution % factor:
            near = max(factor, self.resolution // factor * factor)
            raise InputError(
                f"ValidationImages.resolution is {self.resolution}; give a multiple of {factor}, the VAE's factor, "
                f"such as {near}"
            )
        sampler = for_base(self.sampler, pl_module.checkpoint)
        if isinstance(sampler, DiffusersSampler):
            sampler.make_scheduler()

    def render(self, module: SDXLModule) -> Tensor:
        """Samples one image a prompt, one after the other; returns pixels (B, 3, H, W), about [-1, 1]."""
        generator = torch.Generator().manual_seed(self.seed)
        size = (self.resolution, self.resolution)
        shape = module.latents.shape(*size)
        noises = [torch.randn(1, *shape, generator=generator) for _ in self.prompts]  # before what samplers draw
        settings = self.sampler, self.guidance_scale, self.guidance_interval, generator
        pictures = []
        for prompt, noise in zip(self.prompts, noises, strict=True):
            end_if_asked(module)
            batch = blank_batch([prompt], size, module.device)
            pictures.append(module.sample(batch, noise.to(module.device), *settings))
        return torch.cat(pictures)

    def save(self, pictures: list[Image.Image], folder: Path) -> None:
        """Writes one PNG a prompt, and the sheet that shows the first pictures of the run beside these."""
        step_folder = folder / f"step_{self.rendered_step:06d}"
        self.pictures = [step_folder / f"{index:02d}.png" for index in range(len(pictures))]
        for picture, path in zip(pictures, self.pictures, strict=True):
            write_whole(path, partial(picture.save, format="PNG"))
        before = [folder / "step_000000" / path.name for path in self.pictures]
        if all(path.exists() for path in before):
            rows = {"before": [Image.open(path) for path in before], f"after {self.rendered_step} steps": pictures}
            sheet = contact_sheet(rows, self.prompts)
            write_whole(folder / "before_after.png", partial(sheet.save, format="PNG"))

    def log_images(self, trainer: Trainer, pictures: list[Image.Image]) -> None:
        """Hands the pictures to loggers."""
        log_pictures(trainer.loggers, "validation", pictures, self.prompts, self.rendered_step)
