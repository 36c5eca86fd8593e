"""Pictures of what the module has learned so far."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

from lit_edm.batch import Batch
from lit_edm.callbacks.pictures import PictureCallback
from lit_edm.callbacks.sheet import contact_sheet, log_pictures
from lit_edm.edm import guided, karras_sigmas, sample_heun
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.modules.diffusion import evaluating


class ValidationImages(PictureCallback):
    """Renders prompts before training, every few steps and at the end, always from the same noise.

    Samples with Algorithm 1 of Karras et al. (2022) on their time steps (Eq. 5) over the noise levels that the base
    knows. Writes images/step_<step>/<prompt>.png and images/before_after.png to the run's folder, and the pictures to
    loggers that take them.

    Args:
        prompts: Captions to render; placeholders are replaced as in training.
        every_n_steps: Optimizer steps between renderings; 0 renders before and after training alone.
        resolution: Side of the square pictures in pixels.
        num_steps: Steps of the sampler; the network is evaluated 2 num_steps - 1 times, twice that with guidance.
        guidance_scale: Strength of classifier-free guidance; 1 is none.
        seed: Seed of the initial noise.

    Raises:
        InputError: There is no prompt.
    """

    def __init__(
        self,
        prompts: list[str],
        every_n_steps: int = 0,
        resolution: int = 1024,
        num_steps: int = 20,
        guidance_scale: float = 5.0,
        seed: int = 0,
    ) -> None:
        if not prompts:
            raise InputError("ValidationImages.prompts is empty; write a prompt, or remove the callback")
        super().__init__("images", every_n_steps)
        self.prompts = prompts
        self.resolution = resolution
        self.num_steps = num_steps
        self.guidance_scale = guidance_scale
        self.seed = seed
        self.pictures: list[Path] = []

    @torch.no_grad()
    def render(self, module: SDXLModule) -> Tensor:
        """Samples one image a prompt, one after the other; returns pixels (B, 3, H, W), about [-1, 1]."""
        generator = torch.Generator().manual_seed(self.seed)
        with evaluating(module):
            return torch.cat([self.render_prompt(module, prompt, generator) for prompt in self.prompts])

    def render_prompt(self, module: SDXLModule, prompt: str, generator: torch.Generator) -> Tensor:
        """Samples one image (1, 3, H, W) from the generator's next noise."""
        batch = empty_batch(prompt, self.resolution, module.device)
        sigmas = karras_sigmas(self.num_steps, *module.sigma_range)
        shape = module.latents.shape(self.resolution, self.resolution)
        noise = torch.randn(1, *shape, generator=generator) * sigmas[0]
        denoise = module.denoise(batch)
        if self.guidance_scale != 1:
            denoise = guided(denoise, module.denoise_unconditionally(batch), self.guidance_scale)
        return module.decode(sample_heun(denoise, noise.to(module.device), sigmas))

    def save(self, pictures: list[Image.Image], folder: Path) -> None:
        """Writes one PNG a prompt, and the sheet that shows the first pictures of the run beside these."""
        step_folder = folder / f"step_{self.rendered_step:06d}"
        step_folder.mkdir(parents=True, exist_ok=True)
        self.pictures = [step_folder / f"{index:02d}.png" for index in range(len(pictures))]
        for picture, path in zip(pictures, self.pictures, strict=True):
            picture.save(path)
        before = [folder / "step_000000" / path.name for path in self.pictures]
        if all(path.exists() for path in before):
            rows = {"before": [Image.open(path) for path in before], f"after {self.rendered_step} steps": pictures}
            contact_sheet(rows, self.prompts).save(folder / "before_after.png")

    def log_images(self, trainer: Trainer, pictures: list[Image.Image]) -> None:
        """Hands the pictures to loggers."""
        log_pictures(trainer.loggers, "validation", pictures, self.prompts, self.rendered_step)


def empty_batch(prompt: str, resolution: int, device: torch.device) -> Batch:
    """Returns a batch of one that asks for an uncropped image of the given size."""
    size = torch.full((1, 2), resolution, device=device)
    image = torch.zeros(1, 3, resolution, resolution, device=device)
    return Batch(image=image, caption=[prompt], original_size=size, crop_top_left=torch.zeros_like(size))
