"""How far samples are from held-out images."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import nn

from lit_edm.callbacks.held_out import fixed_noise, held_out_examples
from lit_edm.metrics import FrechetDistance
from lit_edm.modules import EDMModule


class ValidationFrechetDistance(Callback):
    """Logs val/frechet_distance between held-out images and as many samples of the same classes.

    The samples start from the same noise every time, a function of seed and image. Pixels are compared, which is exact
    up to some 32 px; larger images want features.

    Args:
        features: Maps images (B, C, H, W) to features (B, D), which are compared in place of pixels.
        num_steps: Steps of the sampler; the network is evaluated 2 num_steps - 1 times, twice that with guidance.
        guidance_scale: Strength of classifier-free guidance; 1 is none.
        seed: Seed of the initial noise.
    """

    def __init__(
        self, features: nn.Module | None = None, num_steps: int = 18, guidance_scale: float = 1.0, seed: int = 0
    ) -> None:
        self.metric = FrechetDistance(features)
        self.num_steps = num_steps
        self.guidance_scale = guidance_scale
        self.seed = seed

    def on_validation_start(self, trainer: Trainer, pl_module: EDMModule) -> None:
        """Begins with two empty sets."""
        self.metric.to(pl_module.device).reset()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: EDMModule,
        outputs: None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the images of a batch, and a sample for each."""
        batch, indices = held_out_examples(trainer, batch, batch_idx, dataloader_idx)
        if not indices:
            return
        noise = fixed_noise(indices, pl_module.image_shape, self.seed).to(pl_module.device)
        with trainer.precision_plugin.forward_context():
            samples = pl_module.sample(noise, batch["label"], self.num_steps, self.guidance_scale)
        self.metric.update(batch["image"], real=True)
        self.metric.update(samples, real=False)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: EDMModule) -> None:
        """Logs the distance of all images of all processes."""
        pl_module.log("val/frechet_distance", self.metric.compute().float(), prog_bar=True, sync_dist=True)
