"""Fine-tunes SDXL and Playground v2.5. Read this file first: training_step is the flow of the whole package."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lit_edm.batch import Batch, DescribesImages
from lit_edm.edm import Denoise, DiffusionLoss, EDMLoss, Preconditioning, SNRWeighting, UniformTimesteps
from lit_edm.errors import InputError
from lit_edm.modules.diffusion import DiffusionModule, trainable
from lit_edm.sdxl import Adapter, LatentSpace, LoRA, Placeholders, SDXLCheckpoint, SDXLConditioner, SDXLDenoiser
from lit_edm.sdxl.checks import check_loss, check_preconditioning, check_resolution, latent_statistics_differ


class SDXLModule(DiffusionModule):
    """Fine-tunes an SDXL-shaped base: an adapter of the UNet and, by textual inversion, embeddings of new tokens.

    Whether the base predicts epsilon, v or EDM's F, its noise schedule and its latents' statistics are read from its
    configs. The defaults train what SDXL was trained with: plain epsilon-MSE at uniform timesteps.

    Args:
        pretrained: Folder or Hub name of an SDXL checkpoint in diffusers' layout.
        vae: Folder or Hub name of another VAE.
        variant: Weights' file variant, such as fp16.
        revision: Branch, tag or commit on the Hub.
        tokens: For each placeholder in captions the number of new tokens it stands for: {TOK: 2} gives <s0><s1>.
        initializers: For a placeholder, words that its tokens start from; without, they start at random.
        pool_at_end: Pool the second encoder at the end of text. False keeps the rule of SDXL's config, which pools at
            the last new token instead, and needs no extra line when the files are used elsewhere.
        adapter: Chooses the parameters of the UNet to train.
        loss: Scores the denoiser on a batch of latents.
        preconditioning: What the UNet predicts; read from the base if not given.
        optimizer: Creates the optimizer from parameter groups; AdamW at 1e-4 if not given.
        lr_scheduler: Creates the learning rate schedule, stepped every optimizer step.
        embeddings_lr: Learning rate of the new tokens' embeddings; the optimizer's own if not given.
        gradient_checkpointing: Recompute the UNet's activations in the backward pass: less memory, a third slower.
    """

    def __init__(
        self,
        pretrained: str = "stabilityai/stable-diffusion-xl-base-1.0",
        vae: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        tokens: dict[str, int] | None = None,
        initializers: dict[str, str] | None = None,
        pool_at_end: bool = True,
        adapter: Adapter = LoRA(),
        loss: DiffusionLoss = EDMLoss(noise=UniformTimesteps(), weighting=SNRWeighting()),
        preconditioning: Preconditioning | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        embeddings_lr: float | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(loss, optimizer, lr_scheduler)
        self.save_hyperparameters()
        self.strict_loading = False  # checkpoints hold what is trained; on_load_checkpoint is strict about that
        self.checkpoint = SDXLCheckpoint(pretrained, vae, variant, revision)
        self.placeholders = Placeholders(tokens or {})
        self.initializers = initializers or {}
        self.pool_at_end = pool_at_end
        self.adapter = adapter
        self.preconditioning = preconditioning
        self.embeddings_lr = embeddings_lr
        self.gradient_checkpointing = gradient_checkpointing
        if unknown := self.initializers.keys() - self.placeholders.counts.keys():
            raise InputError(f"model.init_args.initializers: {unknown.pop()} is not one of model.init_args.tokens")

    def setup(self, stage: str) -> None:
        """Checks everything that can be checked without weights.

        Raises:
            InputError: Base, loss, precision, resolution, captions or tokens do not fit together.
        """
        self.network_dtype()
        base = self.checkpoint.preconditioning()
        check_preconditioning(self.preconditioning or base, base)
        check_loss(self.loss, base, self.sigma_range)
        if latent_statistics_differ(self.checkpoint):
            rank_zero_warn(
                f"model.init_args.vae: {self.checkpoint.vae} normalises latents in another way than the VAE of "
                f"{self.checkpoint.pretrained}; the UNet will see latents that it was not trained on"
            )
        images = getattr(self._trainer, "datamodule", None)
        if isinstance(images, DescribesImages) and stage == "fit":
            check_resolution(images.resolution, self.checkpoint)
            if absent := self.placeholders.absent_from(images.captions()):
                raise InputError(
                    f"model.init_args.tokens: no caption holds the word {absent[0]}, so its tokens would learn "
                    f"nothing; the first caption is '{images.captions()[0]}'"
                )

    def configure_model(self) -> None:
        """Loads the networks, once: Lightning calls this for every stage."""
        if hasattr(self, "denoiser"):
            return
        dtype = self.network_dtype()  # of frozen weights; what is trained stays float32
        fragile = self.checkpoint.vae_config().get("force_upcast", True)
        self.latents = LatentSpace(self.checkpoint.load_vae(torch.float32 if fragile else dtype))
        self.conditioner = SDXLConditioner(
            self.checkpoint, self.placeholders, self.initializers, self.pool_at_end, dtype
        )
        unet = self.checkpoint.load_unet(dtype)
        self.adapter(unet)
        unet.train()  # from_pretrained leaves it in eval mode, where adapters do not drop out
        if self.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.denoiser = SDXLDenoiser(unet, self.preconditioning or self.checkpoint.preconditioning())

    def on_fit_start(self) -> None:
        """Warns of captions that are cut off."""
        images = getattr(self.trainer, "datamodule", None)
        if isinstance(images, DescribesImages) and (long := self.conditioner.too_long(images.captions())):
            rank_zero_warn(
                f"{len(long)} captions are longer than the text encoders read, and only their beginnings are trained; "
                f"shorten them, the first is '{long[0]}'"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Encodes, denoises, weighs; returns the mean loss of the batch."""
        latents = self.encode(batch)
        loss = self.loss(self.denoise(batch), latents).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(latents))
        return loss

    def encode(self, batch: Batch) -> Tensor:
        """Returns the normalised latents (B, C, H / 8, W / 8) of a batch, float32."""
        return self.latents.encode(batch["image"])

    def denoise(self, batch: Batch) -> Denoise:
        """Returns D(x; sigma) given the captions and sizes of a batch."""
        return partial(self.denoiser, conditioning=self.conditioner(batch["caption"], time_ids(batch)))

    def denoise_unconditionally(self, batch: Batch) -> Denoise:
        """Returns D(x; sigma) given the sizes of a batch and no caption, for classifier-free guidance."""
        return partial(self.denoiser, conditioning=self.conditioner.unconditional(time_ids(batch)))

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the pixels (B, 3, H, W), about [-1, 1], of normalised latents (B, C, H / 8, W / 8)."""
        return self.latents.decode(latents)

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The smallest and the largest noise level that the base knows."""
        return self.checkpoint.sigma_range()

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Returns the new tokens' embeddings, what FreezeEmbeddings freezes."""
        return list(self.conditioner.new_embeddings().values())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Makes one parameter group each of the adapter, the tokens and the loss's own parameters.

        Raises:
            InputError: Prodigy is given two learning rates: it estimates one for all groups.
        """
        groups: list[dict[str, Any]] = [{"name": "unet", "params": trainable(self.denoiser)}]
        if embeddings := self.embedding_parameters():
            rate = {} if self.embeddings_lr is None else {"lr": self.embeddings_lr}
            groups.append({"name": "embeddings", "params": embeddings, **rate})
        optimizer = self.make_optimizer(groups)
        rates = {group["lr"] for group in optimizer.param_groups}
        if type(optimizer).__module__.startswith("prodigyopt") and len(rates) > 1:
            raise InputError(
                f"model.init_args.embeddings_lr is {self.embeddings_lr}, but Prodigy takes one learning rate for all; "
                "remove the line"
            )
        return self.with_schedule(optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what is trained: a few megabytes, whatever the base's size."""
        super().on_save_checkpoint(checkpoint)
        keep = self._trained_names()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in keep}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises InputError if the checkpoint trained other parameters than this module does."""
        self.configure_model()
        if different := self._trained_names() ^ checkpoint["state_dict"].keys():
            raise InputError(
                "the checkpoint was trained with another adapter or other tokens "
                f"({sorted(different)[0]} is on one side only); resume with the config it was trained with"
            )

    def _trained_names(self) -> set[str]:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return trained | {f"loss_parts.{name}" for name in self.loss_parts.state_dict()}


def time_ids(batch: Batch) -> Tensor:
    """Concatenates original size, crop and target size, each height or top first, to SDXL's conditioning (B, 6)."""
    original_size, crop_top_left = batch["original_size"], batch["crop_top_left"]
    height, width = (torch.full_like(original_size[:, :1], side) for side in batch["image"].shape[-2:])
    return torch.cat([original_size, crop_top_left, height, width], dim=1)
