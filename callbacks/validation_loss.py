"""The loss on held-out images, at the same noise levels and with the same noise every time."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_edm.batch import SummarizesImages
from lit_edm.callbacks.held_out import fixed_noise, held_out_examples
from lit_edm.edm import LearnedWeighting, LossWeighting
from lit_edm.errors import InputError
from lit_edm.modules import DiffusionModule
from lit_edm.seeds import seed_of


class ValidationLoss(Callback):
    """Logs lambda(sigma) |D(y + sigma n; sigma) - y|^2 of held-out images, a curve for each of some noise levels.

    The noise n is a function of seed, image and noise level: two values differ because the weights do, and for no other
    reason. Logs val/loss_sigma_<sigma> and their mean val/loss, which ModelCheckpoint may monitor.

    Args:
        sigmas: Noise levels, each > 0; eight by default, evenly spaced in ln(sigma) over those that the module knows.
        weighting: lambda(sigma); by default that of the module's loss, without what it learns, which would move the
            yardstick along.
        seed: Seed of the noise.

    Raises:
        InputError: A noise level is not positive, none of the arguments and the module's loss has a weighting, or there
            are no held-out images.
    """

    def __init__(
        self, sigmas: list[float] | None = None, weighting: LossWeighting | None = None, seed: int = 0
    ) -> None:
        if sigmas is not None and not (sigmas and min(sigmas) > 0):
            raise InputError(f"ValidationLoss.sigmas is {sigmas}; name noise levels above 0")
        self.sigmas = sigmas
        self.weighting = weighting
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: DiffusionModule, stage: str) -> None:
        """Makes sure that there are held-out images, if the data module can tell, and validation is wanted."""
        data = getattr(trainer, "datamodule", None)
        wanted = stage == "fit" and trainer.limit_val_batches != 0
        if wanted and isinstance(data, SummarizesImages) and not data.summary()["held_out"]:
            raise InputError(
                "ValidationLoss: there are no held-out images; name a folder of some as "
                "data.init_args.val_root, or leave the callback out"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        """Makes sure that there is a weighting, before images are encoded or rendered."""
        self._fixed_weighting(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        """Begins with no losses."""
        self._sum = torch.zeros(len(self.levels(pl_module)), dtype=torch.float64)
        self._count = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: DiffusionModule,
        outputs: None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds up the losses of a batch."""
        batch, indices = held_out_examples(trainer, batch, batch_idx, dataloader_idx)
        if indices:
            with trainer.precision_plugin.forward_context():
                self._sum += self.losses(pl_module, batch, indices).double().sum(dim=0).cpu()
            self._count += len(indices)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        """Logs the means over all images of all processes.

        Lightning's own means over processes are inexact where these have different numbers of images.
        """
        levels = self.levels(pl_module)
        total = torch.cat([self._sum, torch.tensor([self._count])]).float().to(pl_module.device)
        *sums, count = trainer.strategy.reduce(total, reduce_op="sum").tolist()
        curves = {f"val/loss_sigma_{sigma:.3g}": value / count for sigma, value in zip(levels, sums, strict=True)}
        pl_module.log_dict(curves, sync_dist=True)
        pl_module.log("val/loss", sum(curves.values()) / len(curves), prog_bar=True, sync_dist=True)

    @torch.no_grad()
    def losses(self, module: DiffusionModule, batch: dict[str, Any], indices: list[int]) -> Tensor:
        """Returns the loss of each example at each noise level, shape (B, K).

        Args:
            module: Encodes and denoises.
            batch: B examples.
            indices: Index of each example in the held-out set.
        """
        clean, denoise = self._encode(module, batch, indices), module.denoise(batch)
        weighting = self._fixed_weighting(module)
        columns = []
        for level, sigma in enumerate(self.levels(module)):
            noise = fixed_noise(indices, tuple(clean.shape[1:]), self.seed, level).to(clean)
            sigmas = clean.new_full((len(clean),), sigma)
            error = (denoise(clean + sigma * noise, sigmas) - clean).square().flatten(1).mean(1)
            columns.append(weighting(sigmas) * error)
        return torch.stack(columns, dim=1)

    def levels(self, module: DiffusionModule) -> list[float]:
        """Returns the K noise levels."""
        if self.sigmas is not None:
            return self.sigmas
        low, high = torch.tensor(module.sigma_range, dtype=torch.float64).log()
        return torch.linspace(low, high, 8, dtype=torch.float64).exp().tolist()

    def _encode(self, module: DiffusionModule, batch: dict[str, Any], indices: list[int]) -> Tensor:
        # A VAE samples its latents: one image at a time, each image's from a seed of its own.
        latents = []
        with isolate_rng():
            for position, index in enumerate(indices):
                torch.manual_seed(seed_of(self.seed, index))
                latents.append(module.encode({key: values[position : position + 1] for key, values in batch.items()}))
        return torch.cat(latents)

    def _fixed_weighting(self, module: DiffusionModule) -> LossWeighting:
        weighting = self.weighting or getattr(module.loss, "weighting", None)
        if weighting is None:
            raise InputError(f"ValidationLoss.weighting: name one, for {type(module.loss).__name__} has none")
        return weighting.weighting if isinstance(weighting, LearnedWeighting) else weighting
