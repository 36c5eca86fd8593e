"""Fine-tunes SDXL and Playground v2.5. Read this file first: training_step is the flow of the whole package."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional

from lit_edm.batch import (
    Batch,
    CachesLatents,
    DescribesImages,
    NeedsPictures,
)
from lit_edm.cache import TensorCache
from lit_edm.edm import (
    Denoise,
    DiffusionLoss,
    EDMLoss,
    Preconditioning,
    SNRWeighting,
    Target,
    UniformTimesteps,
)
from lit_edm.errors import InputError
from lit_edm.modules.diffusion import trainable
from lit_edm.modules.fsdp2 import ShardedTraining, check_strategy
from lit_edm.modules.generation import Generation, read_files
from lit_edm.modules.groups import ParameterGroups
from lit_edm.modules.prior import teacher_target
from lit_edm.modules.rendering import SDXLRenderer
from lit_edm.modules.sharding import agree, shard, unsharded
from lit_edm.modules.trial import try_optimizer
from lit_edm.sdxl import (
    Adapter,
    LatentSpace,
    LoRA,
    Placeholders,
    SDXLCheckpoint,
    SDXLConditioner,
    SDXLDenoiser,
)
from lit_edm.sdxl.adapters import initial_state
from lit_edm.sdxl.checkpointing import Block, choose, compute_again
from lit_edm.sdxl.checks import (
    check_clip_skip,
    check_initializers,
    check_loss,
    check_preconditioning,
    check_quantization,
    check_sizes,
    check_teacher,
    check_what_is_trained,
    latent_statistics_differ,
)
from lit_edm.sdxl.compilation import check_compiler, compile_blocks
from lit_edm.sdxl.from_file import start_embeddings
from lit_edm.sdxl.latents import vae_factor
from lit_edm.sdxl.outlines import adapted_unet, check_text_encoders, check_unet, check_weights
from lit_edm.sdxl.placement import alone
from lit_edm.sdxl.quantized import Quantization, quantize
from lit_edm.seeds import run_seed, seed_of, seeded

LOSS_OF_THE_BASE = EDMLoss(UniformTimesteps(), SNRWeighting())
"""Stands for what the base was trained with until its configs are read; SDXL's own."""


class SDXLModule(ShardedTraining, SDXLRenderer):
    """Fine-tunes an SDXL-shaped base: the UNet, the text encoders and, by textual inversion, embeddings of new tokens.

    Whether the base predicts epsilon, v or EDM's F, its noise schedule and its latents' statistics are read from its
    configs.

    Args:
        pretrained: Folder or Hub name of an SDXL checkpoint in diffusers' layout.
        vae: Folder or Hub name of another VAE.
        variant: Weights' file variant, such as fp16.
        revision: Branch, tag or commit on the Hub.
        tokens: For each placeholder in captions the number of new tokens it stands for: {TOK: 2} gives <s0><s1>.
        initializers: For a placeholder, words that its tokens start from; without, they start at random.
        embeddings: File or folder that all tokens' embeddings start from in place of words, as SaveAdapter writes it.
        pool_at_end: Pool the second encoder at the end of text. False keeps the rule of SDXL's config, which pools at
            the last new token instead, and needs no extra line when the files are used elsewhere.
        clip_skip: Hidden layers of the text encoders to skip from the penultimate one on, as diffusers counts them.
        adapter: Chooses what is trained of the UNet; null trains nothing of it.
        text_encoder_adapter: Chooses what is trained of both text encoders; null trains nothing of them.
        quantization: How the UNet's frozen weights are held on the device: int8 takes half of bf16's memory, but steps
            are slower, which make the weights anew; null leaves them as they are.
        text_encoder_quantization: Likewise of both text encoders.
        loss: Scores the denoiser on a batch of latents; if not given, what the base was trained with: the plain squared
            error of epsilon or of v at uniform timesteps, or EDM's own.
        preconditioning: What the UNet predicts; read from the base if not given.
        optimizer: Creates the optimizer from parameter groups; AdamW at 1e-4 if not given.
        lr_scheduler: Creates the learning rate schedule, stepped every optimizer step.
        embeddings_lr: Learning rate of the new tokens' embeddings; the optimizer's own if not given.
        embeddings_weight_decay: Weight decay of the new tokens' embeddings; the optimizer's own if not given.
        text_encoders_lr: Learning rate of the text encoders; the optimizer's own if not given.
        text_encoders_weight_decay: Weight decay of the text encoders; the optimizer's own if not given.
        gradient_checkpointing: Compute blocks again in the backward pass rather than keep their activations: true for
            all of them, in the least memory and a third slower; or GiB that those of the UNet may take on each device,
            for no more blocks than it needs, which are chosen by counting what a batch of the largest images keeps.
            Text encoders that learn, which are small beside, are computed again with either.
        compile: Compile the UNet's transformer blocks: faster steps, after a first one of a minute or so.
        text_cache: Where encoded captions are kept while neither text encoders nor tokens learn, so that the encoders
            leave the device; nowhere if not given.
        generation: How `lit-edm predict` renders, and what with.
    """

    groups: ParameterGroups

    def __init__(
        self,
        pretrained: str = "stabilityai/stable-diffusion-xl-base-1.0",
        vae: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        tokens: dict[str, int] | None = None,
        initializers: dict[str, str] | None = None,
        embeddings: str | None = None,
        pool_at_end: bool = True,
        clip_skip: int = 0,
        adapter: Adapter | None = LoRA(),
        text_encoder_adapter: Adapter | None = None,
        quantization: Quantization | None = None,
        text_encoder_quantization: Quantization | None = None,
        loss: DiffusionLoss | None = None,  # a default's weighting would stay behind when YAML names a noise alone
        preconditioning: Preconditioning | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        embeddings_lr: float | None = None,
        embeddings_weight_decay: float | None = None,
        text_encoders_lr: float | None = None,
        text_encoders_weight_decay: float | None = None,
        gradient_checkpointing: bool | float = False,
        compile: bool = False,  # noqa: A002 (what torch calls it)
        text_cache: TensorCache | None = None,
        generation: Generation = Generation(),
    ) -> None:
        super().__init__(loss or LOSS_OF_THE_BASE, optimizer, lr_scheduler)
        self.save_hyperparameters()
        self.strict_loading = False  # checkpoints hold what is trained; on_load_checkpoint is strict about that
        self.checkpoint = SDXLCheckpoint(pretrained, vae, variant, revision)
        self.placeholders = Placeholders(tokens or {})
        self.initializers = initializers or {}
        self.embeddings = embeddings
        self.pool_at_end = pool_at_end
        self.clip_skip = clip_skip
        self.adapter = adapter
        self.text_encoder_adapter = text_encoder_adapter
        self.quantization: Quantization | None = quantization
        self.text_encoder_quantization: Quantization | None = text_encoder_quantization
        self.preconditioning = preconditioning
        self.group_settings: dict[str, dict[str, float | None]] = {
            "unet": {},
            "text_encoders": {"lr": text_encoders_lr, "weight_decay": text_encoders_weight_decay},
            "embeddings": {"lr": embeddings_lr, "weight_decay": embeddings_weight_decay},
        }
        self.gradient_checkpointing = gradient_checkpointing
        self.computed_again: tuple[Block, ...] | None = None  # all of them until a run's batches are known
        self.compiles = compile  # modules have a method of that name
        self.text_cache = text_cache
        self.generation = generation
        if unknown := self.initializers.keys() - self.placeholders.counts.keys():
            raise InputError(f"model.init_args.initializers: {unknown.pop()} is not one of model.init_args.tokens")
        if embeddings is not None and (initializers or not tokens):
            raise InputError(
                f"model.init_args.embeddings: {embeddings} is where all tokens start; give model.init_args.tokens, "
                "and no initializers"
            )

    def setup(self, stage: str) -> None:
        """Checks everything that can be checked without weights.

        Raises:
            InputError: Base, loss, precision, sizes, captions, tokens or files do not fit together, or nothing is to
                be trained.
        """
        self.network_dtype()
        check_quantization("quantization", self.quantization, self.adapter)
        check_quantization("text_encoder_quantization", self.text_encoder_quantization, self.text_encoder_adapter)
        self.checkpoint.check_files()
        base = self.checkpoint.preconditioning()
        check_preconditioning(self.preconditioning or base, base)
        check_clip_skip(self.clip_skip, self.checkpoint)
        if latent_statistics_differ(self.checkpoint):
            rank_zero_warn(
                f"model.init_args.vae: {self.checkpoint.vae} normalises latents in another way than the VAE of "
                f"{self.checkpoint.pretrained}; the UNet will see latents that it was not trained on"
            )
        images = getattr(self._trainer, "datamodule", None)
        if self.compiles and self._trainer is not None:
            check_compiler(self.trainer.strategy.root_device)
        if self.device_mesh is not None:
            whole = {"quantization": self.quantization, "compile": self.compiles}
            check_strategy(self.trainer.strategy, str(self.trainer.precision), stage, images, whole)
        if stage == "predict":
            self.files = read_files(self.generation, self.checkpoint, self.placeholders, images)
            for file, weights in self.files.adapters.values():
                check_weights(self.checkpoint, weights, file.path)
            self.fresh = not hasattr(self, "denoiser")
            return
        if self.loss is LOSS_OF_THE_BASE:
            self.loss = self.checkpoint.pretraining_loss()
        check_loss(self.loss, base, self.sigma_range)
        if stage == "fit":
            adapters = self.adapter, self.text_encoder_adapter
            check_what_is_trained(*adapters, self.placeholders.counts, self.group_settings)
            try_optimizer(self.optimizer, self.lr_scheduler, self.trained_groups(), self.group_settings)
            self.check_networks(images)
        if isinstance(images, DescribesImages) and stage == "fit":
            check_sizes(images.sizes(), self.checkpoint)
            check_teacher(images.needs_teacher, self.adapter, self.text_encoder_adapter)
            if images.captions_vary and self.text_cache is not None:
                rank_zero_warn(
                    "model.init_args.text_cache keeps no captions that data.init_args.shuffle_tags shuffles anew each "
                    "time; the text encoders encode them in every step, and stay on the device"
                )
            if absent := self.placeholders.absent_from(images.captions()):
                raise InputError(
                    f"model.init_args.tokens: no caption holds the word {absent[0]}, so its tokens would learn "
                    f"nothing; the first caption is '{images.captions()[0]}'"
                )
        if stage == "fit" and not isinstance(self.gradient_checkpointing, bool):
            self.computed_again = self.blocks_to_compute_again(images, self.gradient_checkpointing)

    def blocks_to_compute_again(self, images: object, gib: float) -> tuple[Block, ...]:
        """Returns the blocks of the UNet whose activations have to go, so that a batch's take no more than so many GiB.

        Raises:
            InputError: They take more at the least, or the data module does not say how large a batch is.
        """
        count = getattr(images, "batch_size", None)
        if not isinstance(images, DescribesImages) or not isinstance(count, int):
            raise InputError(
                f"model.init_args.gradient_checkpointing is {gib:g} GiB, but the data module tells no batch_size and "
                "sizes that activations could be counted for; write true or false"
            )
        unet = adapted_unet(self.checkpoint, self.adapter, self.network_dtype())
        height, width = max(images.sizes(), key=lambda size: size[0] * size[1])
        factor = vae_factor(self.checkpoint.vae_config())
        shape = count, unet.config.in_channels, height // factor, width // factor
        learns_text = bool(self.placeholders.names) or self.text_encoder_adapter is not None
        return choose(unet, self.network_dtype(), shape, learns_text, gib)

    def check_networks(self, images: object) -> None:
        """Checks what is put on the networks, and where what they make is kept; see setup."""
        if self.text_cache is not None:
            self.text_cache.check("model.init_args.text_cache")
        if isinstance(cache := getattr(images, "latent_cache", None), TensorCache):
            cache.check("data.init_args.latent_cache")
        if self.adapter is not None:
            check_unet(self.checkpoint, self.adapter)
        if self.text_encoder_adapter is not None or self.embeddings is not None:
            count = len(self.placeholders.names)
            check_text_encoders(self.checkpoint, self.text_encoder_adapter, self.clip_skip, self.embeddings, count)
        if self.initializers:
            counts, (tokenizer, _) = self.placeholders.counts, self.checkpoint.load_tokenizers()
            for warning in check_initializers(self.initializers, counts, tokenizer):
                rank_zero_warn(warning)

    def configure_model(self) -> None:
        """Loads the networks, once: Lightning calls this for every stage, each of which may have other batches.

        Where what is trained starts follows from the run's seed alone, whatever was drawn before, on all processes.
        """
        if not hasattr(self, "denoiser"):
            with seeded(seed_of(run_seed())):
                self.load_networks()
        if self.computed_again is not None:
            compute_again(self.denoiser.unet, [block.name for block in self.computed_again])

    def load_networks(self) -> None:
        """Loads the networks and puts on them what is trained."""
        if self.loss is LOSS_OF_THE_BASE:
            self.loss = self.checkpoint.pretraining_loss()
        dtype = self.network_dtype()  # of frozen weights; what is trained stays float32
        fragile = self.checkpoint.vae_config().get("force_upcast", True)
        self.latents = LatentSpace(self.checkpoint.load_vae(torch.float32 if fragile else dtype))
        self.conditioner = SDXLConditioner(
            self.checkpoint,
            self.placeholders,
            self.initializers,
            self.pool_at_end,
            dtype,
            self.clip_skip,
            self.text_encoder_adapter,
            self.text_cache,
            self.text_encoder_quantization,
        )
        if self.embeddings is not None:
            start_embeddings(self.embeddings, self.conditioner.new_embeddings())
        unet = self.checkpoint.load_unet(dtype)
        if self.quantization is not None:
            quantize(unet)
        if self.adapter is not None:
            self.adapter(unet)
        unet.train()  # from_pretrained leaves it in eval mode, where adapters do not drop out
        if self.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
            self.conditioner.enable_gradient_checkpointing()
        if self.compiles:
            compile_blocks(unet)
        self.denoiser = SDXLDenoiser(unet, self.preconditioning or self.checkpoint.preconditioning())
        if self.device_mesh is not None:
            names = self._trained_names()
            agree((value for name, value in self.state_dict().items() if name in names), self.device)
            shard(unet, self.device_mesh["data_parallel"], dtype)
        self.groups = ParameterGroups(
            {
                "unet": trainable(self.denoiser),
                "text_encoders": self.conditioner.adapter_parameters(),
                "embeddings": self.embedding_parameters(),
            }
        )

    def on_fit_start(self) -> None:
        """Has images and captions encoded that training would encode again and again; warns of captions cut off."""
        self.groups.wake()
        images = getattr(self.trainer, "datamodule", None)
        encoders = self.conditioner.encoders
        if isinstance(images, NeedsPictures):
            with unsharded(self), alone(self.render_class_images, [encoders]) as render:
                images.render_missing(render)
        if isinstance(images, CachesLatents):
            others = [encoders] if self.device_mesh is not None else [encoders, self.denoiser]  # shards stay in place
            with alone(self.moments, others) as encode:
                if images.fill_cache(encode, self.latents.fingerprint):
                    self.latents.release()  # before the others are back
        if isinstance(images, DescribesImages) and (long := self.conditioner.too_long(images.captions())):
            rank_zero_warn(
                f"{len(long)} captions are longer than the text encoders read, and only their beginnings are trained; "
                f"shorten them, the first is '{long[0]}'"
            )
        self.keep_texts()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds the step, and finds out whether captions are learned from in it."""
        super().on_train_batch_start(batch, batch_idx)
        learned, learns = self.conditioner.learning, self.groups.learn("text_encoders", "embeddings")
        self.conditioner.learning = learns
        if learned and not learns:
            self.keep_texts()
        elif learns and not learned:
            self.conditioner.take_back(self.device)

    def keep_texts(self) -> None:
        """Has all captions encoded, once and for all, if nothing learns from them any more."""
        images = getattr(self.trainer, "datamodule", None)
        if isinstance(images, DescribesImages) and not images.captions_vary:
            with self.trainer.precision_plugin.forward_context():
                self.conditioner.keep(images.captions(), self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Encodes, denoises, weighs; returns the mean loss of the batch."""
        with self.sharing(batch, len(batch["caption"])):
            latents = self.encode(batch)
            losses = self.loss(self.denoise(batch), latents, **self.target_and_mask(batch, latents))
        loss = (losses * batch.get("weight", 1.0)).mean()
        self.log_loss(loss, len(latents))
        return loss + self.groups.nothing_of_resting()

    def moments(self, image: Tensor) -> Tensor:
        """Returns the VAE's mean and log-variance (B, 2C, H / 8, W / 8) of pixels (B, 3, H, W), from any device."""
        return self.latents.moments(image.to(self.device))

    def encode(self, batch: Batch) -> Tensor:
        """Returns the normalised latents (B, C, H / 8, W / 8) of a batch, float32."""
        return self.latents.sample(batch["moments"] if "moments" in batch else self.moments(batch["image"]))

    def denoise(self, batch: Batch) -> Denoise:
        """Returns D(x; sigma) given the captions and sizes of a batch; captions are empty where they were dropped."""
        encode = self.conditioner.with_dropped if self.training else self.conditioner
        return partial(self.denoiser, conditioning=encode(batch["caption"], self.time_ids(batch)))

    def denoise_unconditionally(self, batch: Batch) -> Denoise:
        """Returns D(x; sigma) given the sizes of a batch and no caption, for classifier-free guidance."""
        return partial(self.denoiser, conditioning=self.conditioner.unconditional(self.time_ids(batch)))

    def target_and_mask(self, batch: Batch, latents: Tensor) -> dict[str, Any]:
        """Returns what else a batch asks of the loss: a target for some examples, a mask (B, 1, h, w), or nothing."""
        extras: dict[str, Any] = {}
        if any(batch.get("teacher", ())):
            extras["target"] = self.taught(batch)
        if "mask" in batch:
            extras["mask"] = functional.interpolate(batch["mask"], latents.shape[-2:], mode="area")
        return extras

    def taught(self, batch: Batch) -> Target:
        """Returns the target that has the untouched base's prediction in place of y where a batch asks for a teacher.

        So a class keeps its look without an image of it: the base is the teacher, at the same noise.
        """
        rows = [row for row, teacher in enumerate(batch.get("teacher", ())) if teacher]
        captions = [batch["caption"][row] for row in rows]
        index = torch.tensor(rows).to(self.device, non_blocking=True)  # a list would make the host wait, each time
        conditioning = self.conditioner.untouched(captions, self.time_ids(batch)[index])
        return teacher_target(partial(self.denoiser, conditioning=conditioning), index, self.untouched)

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the pixels (B, 3, H, W), about [-1, 1], of normalised latents (B, C, H / 8, W / 8)."""
        return self.latents.decode(latents)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns what is trained, by the names that callbacks know: unet, text_encoders, embeddings."""
        return self.groups.parameters

    def trained_groups(self) -> list[str]:
        """Returns the names of the groups that will be trained, known before there are networks."""
        names = self.placeholders.names
        given = {"unet": self.adapter, "text_encoders": self.text_encoder_adapter, "embeddings": names}
        return [name for name, part in given.items() if part]

    def set_trained(self, group: str, trained: bool) -> None:
        """Lets a parameter group rest from the next step on, or learn again; who does so drops its gradients too."""
        self.groups.set_trained(group, trained)

    def embedding_parameters(self) -> list[nn.Parameter]:
        """Returns the new tokens' embeddings, what FreezeEmbeddings freezes."""
        return list(self.conditioner.new_embeddings().values())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Makes one parameter group each of UNet, text encoders, tokens and the loss's own parameters."""
        return self.with_schedule(self.make_optimizer(self.groups.for_optimizer(self.group_settings)))

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
        return trained | initial_state(self).keys() | {f"loss_parts.{name}" for name in self.loss_parts.state_dict()}
