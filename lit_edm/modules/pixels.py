"""Trains a denoiser of small images from scratch, as Karras et al. (2022) do."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_edm.batch import DescribesLabelledImages, LabelledBatch
from lit_edm.edm import (
    Denoise,
    DiffusionLoss,
    EDMLoss,
    EDMPreconditioning,
    Preconditioning,
    guided,
    karras_sigmas,
    sample_heun,
)
from lit_edm.edm.draws import drawn
from lit_edm.errors import InputError
from lit_edm.modules.diffusion import DiffusionModule, evaluating, trainable


class EDMModule(DiffusionModule):
    """Trains a denoiser of images from nothing; its clean latents are the pixels themselves.

    The defaults are the column "Ours" of Table 1. sigma_data there is 0.5, the RMS of natural images; that of other
    images is what `scripts/sigma_data.py` prints, and belongs into preconditioning, weighting and noise alike.

    Args:
        network: F, called with its input (B, C, H, W), c_noise (B,) and class labels (B,) or None; returns (B, C, H, W)
            or, as diffusers' UNet2DModel, something that holds them as its sample.
        image_shape: Channels, height and width of the images.
        num_classes: Classes K that the network is told of; none if not given.
        label_dropout: Share of examples trained as class K, which stands for any: what guidance contrasts with, in
            [0, 1]. The network must know K + 1 classes then.
        preconditioning: The scalings around the network.
        loss: Scores the denoiser on a batch of images.
        optimizer: Creates the optimizer from parameter groups; AdamW at 1e-4 if not given.
        lr_scheduler: Creates the learning rate schedule, stepped every optimizer step.
        sigma_min: Smallest noise level to sample from, > 0.
        sigma_max: Largest noise level to sample from.
    """

    def __init__(
        self,
        network: nn.Module,
        image_shape: tuple[int, int, int],
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        preconditioning: Preconditioning = EDMPreconditioning(),
        loss: DiffusionLoss = EDMLoss(),
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        super().__init__(loss, optimizer, lr_scheduler)
        self.save_hyperparameters(ignore=["network"])
        if self.built_from_config():
            self.save_hyperparameters()  # with the network, which is plain text then and no module
        self.network = network
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.preconditioning = preconditioning
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        if not 0 <= label_dropout <= 1:
            raise InputError(f"model.init_args.label_dropout is {label_dropout}; it is a share, in [0, 1]")

    def setup(self, stage: str) -> None:
        """Checks that preconditioning, loss, precision and images fit together.

        Raises:
            InputError: They do not.
        """
        self.network_dtype()
        sigma_data = self.preconditioning.sigma_data
        for name in ("noise", "weighting"):
            part = getattr(self.loss, name, None)
            if (other := getattr(part, "sigma_data", sigma_data)) != sigma_data:
                raise InputError(
                    f"model.init_args.loss.init_args.{name}.init_args.sigma_data is {other}, but that of "
                    f"model.init_args.preconditioning is {sigma_data}: write the RMS of the images in both"
                )
        images = getattr(self._trainer, "datamodule", None)
        if isinstance(images, DescribesLabelledImages):
            self._check_images(images)

    def _check_images(self, images: DescribesLabelledImages) -> None:
        if tuple(images.image_shape) != self.image_shape:
            raise InputError(
                f"model.init_args.image_shape is {list(self.image_shape)}, but the images are "
                f"{list(images.image_shape)}: write that"
            )
        if self.num_classes not in (None, len(images.class_names)):
            raise InputError(
                f"model.init_args.num_classes is {self.num_classes}, but the images are of {len(images.class_names)} "
                "classes: write that, or null for a network that is not told of them"
            )

    def training_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Encodes, denoises, weighs; returns the mean loss of the batch."""
        images = self.encode(batch)
        with self.sharing(batch, len(images)):
            losses = self.loss(self.denoise(batch), images)
        loss = (losses * batch.get("weight", 1.0)).mean()
        self.log_loss(loss, len(images))
        return loss

    def encode(self, batch: LabelledBatch) -> Tensor:
        """Returns the images (B, C, H, W) of a batch."""
        return batch["image"]

    def denoise(self, batch: LabelledBatch) -> Denoise:
        """Returns D(x; sigma) given the classes of a batch; in training, without some of them."""
        if self.num_classes is None:
            return self._denoise_given(None)
        label = batch["label"]
        if self.training:
            dropped = drawn(len(label), lambda count: torch.rand(count, device=label.device)) < self.label_dropout
            label = label.masked_fill(dropped, self.num_classes)
        return self._denoise_given(label)

    def denoise_unconditionally(self, batch: LabelledBatch) -> Denoise:
        """Returns D(x; sigma) of any class, for classifier-free guidance.

        Raises:
            InputError: The network was not trained without classes.
        """
        if self.num_classes is None or self.label_dropout == 0:
            raise InputError("guidance needs model.init_args.num_classes and a model.init_args.label_dropout above 0")
        return self._denoise_given(torch.full_like(batch["label"], self.num_classes))

    def _denoise_given(self, label: Tensor | None) -> Denoise:
        def network(x: Tensor, c_noise: Tensor) -> Tensor:
            output = self.network(x, c_noise, label)
            return output if isinstance(output, Tensor) else output.sample

        return partial(self.preconditioning.denoise, network)

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the pixels (B, C, H, W) as they are."""
        return latents

    @torch.no_grad()
    def sample(self, noise: Tensor, label: Tensor, num_steps: int = 18, guidance_scale: float = 1.0) -> Tensor:
        """Samples images with Algorithm 1 on the time steps of Eq. 5; the network is evaluated 2 num_steps - 1 times.

        Args:
            noise: What to start from, of unit variance, (B, C, H, W).
            label: Class of each image, (B,), int64; of no matter without classes.
            num_steps: Steps N of the sampler.
            guidance_scale: Strength of classifier-free guidance; 1 is none.

        Returns:
            Pixels (B, C, H, W), about [-1, 1].
        """
        batch = LabelledBatch(image=noise, label=label)
        sigmas = karras_sigmas(num_steps, *self.sigma_range)
        with evaluating(self):
            denoise = self.denoise(batch)
            if guidance_scale != 1:
                denoise = guided(denoise, self.denoise_unconditionally(batch), guidance_scale)
            return self.decode(sample_heun(denoise, noise * sigmas[0], sigmas))

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The smallest and the largest noise level to sample from."""
        return self.sigma_min, self.sigma_max

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Makes one parameter group each of the network and of the loss's own parameters."""
        groups: list[dict[str, Any]] = [{"name": "network", "params": trainable(self.network)}]
        return self.with_schedule(self.make_optimizer(groups))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes the preconditioning, without which the weights are of no use."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["preconditioning"] = repr(self.preconditioning)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises InputError if the checkpoint was trained with another preconditioning."""
        if (trained := checkpoint["preconditioning"]) != repr(self.preconditioning):
            raise InputError(
                f"the checkpoint was trained with preconditioning {trained}, not {self.preconditioning!r}; "
                "use it with the config it was trained with"
            )
