"""Trains the UNet and both text encoders of the tiny base from nothing: text to image by this package's own parts.

A base that has learned nothing is a base like any other, of which everything is trained: SDXLModule with FullFinetune,
embeddings included, on captioned images, with EDM's loss, an average of the weights, and checkpoints to go on from.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from tiny_base_data import PARTS, SIDE, TEMPLATES
from tiny_base_words import CONTEXT, read_tokenizer
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lit_edm.cache import MemoryCache
from lit_edm.callbacks import EndOnSigterm, ExponentialMovingAverage, SeamlessResume
from lit_edm.checkpoints import WholeCheckpointIO, find_last
from lit_edm.data import CaptionedImagesDataModule, Concept
from lit_edm.edm import EDMLoss, EDMWeighting, LogNormal, Stratified
from lit_edm.errors import InputError
from lit_edm.loggers import ResumableCSVLogger
from lit_edm.modules import SDXLModule
from lit_edm.optim import WarmupSchedule
from lit_edm.sdxl import FullFinetune
from lit_edm.sdxl.sizes import BaseSize, text_size, unet_size, vae_size
from lit_edm.sdxl.tiny import add_key_prefix, make_scheduler, make_unet, text_config
from lit_edm.seeds import seeded

ICONS = BaseSize(
    unet_size((64, 96, 128), (2, 3, 4), (1, 1, 1), SIDE // 4, 32, layers_per_block=1, norm_num_groups=16),
    vae_size((16, 32, 64), norm_num_groups=8, layers_per_block=1),
    (
        text_size(64, 3, 2, 256, projection=96) | {"max_position_embeddings": CONTEXT},
        text_size(96, 3, 3, 384, projection=96) | {"max_position_embeddings": CONTEXT},
    ),
)
"""The tiny base's networks; the vocabulary is that of its captions."""


@dataclass(frozen=True)
class BaseTraining:
    """How the base is trained.

    Args:
        batch_size: Images in a step.
        lr: Learning rate of AdamW; 0.0015 was stable, 0.002 was not in bf16.
        warmup_steps: Steps over which it grows.
        caption_dropout: Share of captions that are left out, which guidance needs.
        half_life: Images after which the share of old weights in their average has halved, when there have been many.
        p_mean: Mean of ln(sigma) in training, far above EDM's own -1.2: as few different pictures as these are told
            apart by themselves below a sigma of about 5, so that what a prompt means is learned above it alone.
        p_std: Standard deviation of ln(sigma).
        repeats: Times an epoch shows each flat icon on white, for every time that it shows any other picture.
        precision: What the networks compute in: 32-true or bf16-mixed.
        seed: What all random numbers follow from.
    """

    batch_size: int = 64
    lr: float = 1.5e-3
    warmup_steps: int = 100
    caption_dropout: float = 0.1
    half_life: float = 20_000.0
    p_mean: float = 0.4
    p_std: float = 1.4
    repeats: int = 4
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed"
    seed: int = 0


class EndAfter(Callback):
    """Ends a run, in all processes at once, as if it had all its steps, after some time; it can be resumed.

    Args:
        minutes: How long, from the first step of this call on.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the clock."""
        self.end = monotonic() + 60 * self.minutes

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Ends the run if it is time in any process."""
        trainer.should_stop = trainer.strategy.reduce_boolean_decision(monotonic() >= self.end, all=False)


class FromScratch(SDXLModule):
    """SDXLModule with the attention that is fastest for very few latents: plain products, without a fused kernel."""

    def load_networks(self) -> None:
        """Loads the networks."""
        super().load_networks()
        self.denoiser.unet.set_attn_processor(AttnProcessor())


def make_start(data: Path, vae: Path, folder: Path, size: BaseSize, seed: int) -> None:
    """Writes a base in diffusers' layout that has a VAE, a tokenizer, and networks that have learned nothing.

    The UNet's last layer is zero, so that F = 0 and every noise level starts at an EDM loss of about 1.

    Args:
        data: Folder of the data step.
        vae: Folder of the trained VAE.
        folder: Where to write.
        size: What the networks are like.
        seed: What their weights follow from.

    Raises:
        InputError: There is no VAE yet.
    """
    if not vae.is_dir():
        raise InputError(f"there is no {vae}: run `tiny_base.py vae` until it is done")
    first, second = read_tokenizer(data / "tokenizer"), read_tokenizer(data / "tokenizer", pad_token="!")
    with seeded(seed):
        unet = make_unet(size)
        encoders = [text_config(settings, len(first)) for settings in size.text_encoders]
        text_encoder, text_encoder_2 = CLIPTextModel(encoders[0]), CLIPTextModelWithProjection(encoders[1])
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    write_base(
        StableDiffusionXLPipeline(
            vae=AutoencoderKL.from_pretrained(vae),
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=first,
            tokenizer_2=second,
            unet=unet,
            scheduler=make_scheduler("edm"),
        ),
        folder,
    )


def write_base(pipeline: Any, folder: Path) -> None:
    """Writes a pipeline with the names of weights that published checkpoints have."""
    pipeline.save_pretrained(folder)
    add_key_prefix(folder / "text_encoder" / "model.safetensors", "text_model.")


def make_module(start: Path, settings: BaseTraining) -> SDXLModule:
    """Returns the module that learns everything of a base but its VAE."""
    return FromScratch(
        str(start),
        adapter=FullFinetune(embeddings=True),
        text_encoder_adapter=FullFinetune(embeddings=True),
        loss=EDMLoss(Stratified(LogNormal(settings.p_mean, settings.p_std)), EDMWeighting(0.5)),
        optimizer=partial(torch.optim.AdamW, lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0),
        lr_scheduler=partial(WarmupSchedule, warmup_steps=settings.warmup_steps),
    )


def make_data(data: Path, settings: BaseTraining, processes: int = 1) -> CaptionedImagesDataModule:
    """Returns all pictures, each under all templates of captions, as many concepts of one folder."""
    return CaptionedImagesDataModule(
        concepts=[
            Concept(data / part, caption_column=f"caption_{number}", repeats=settings.repeats if part == "flat" else 1)
            for part in PARTS
            for number in range(len(TEMPLATES))
        ],
        resolution=SIDE,
        caption_dropout=settings.caption_dropout,
        latent_cache=MemoryCache(),
        batch_size=settings.batch_size // processes,
    )


def train_unet(
    data: Path,
    start: Path,
    folder: Path,
    settings: BaseTraining,
    images: int,
    minutes: float,
    device: str,
    processes: int = 1,
) -> int:
    """Trains, from where an earlier call was, for so many minutes or until all images have been seen.

    Args:
        data: Folder of the data step.
        start: Folder of the base that has learned nothing.
        folder: Where checkpoints/ and metrics.csv go.
        settings: How it is trained.
        images: How many images in all.
        minutes: How long at most.
        device: cpu, or another of Lightning's accelerators.
        processes: Processes that share out the images of a step: one for each core, or for each GPU.

    Returns:
        How many images have been seen in all.

    Raises:
        InputError: The images of a step cannot be shared out evenly.
    """
    if settings.batch_size % processes:
        raise InputError(f"--settings.batch_size {settings.batch_size} is no multiple of --processes {processes}")
    seed_everything(settings.seed, verbose=False)
    trainer = Trainer(
        accelerator=device,
        devices=processes,
        strategy=DDPStrategy(gradient_as_bucket_view=True, static_graph=True) if processes > 1 else "auto",
        precision=settings.precision,
        max_steps=max(1, images // settings.batch_size),
        max_epochs=-1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        plugins=[WholeCheckpointIO()],
        logger=ResumableCSVLogger(folder.parent, name=folder.name, version=""),
        log_every_n_steps=25,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ExponentialMovingAverage(settings.half_life),
            EndAfter(minutes),
            SeamlessResume(),
            EndOnSigterm(),
            ModelCheckpoint(
                folder / "checkpoints", every_n_train_steps=500, save_last=True, enable_version_counter=False
            ),
        ],
    )
    begun = any((folder / "checkpoints").glob("*.ckpt"))
    trainer.fit(
        make_module(start, settings),
        make_data(data, settings, processes),
        ckpt_path=find_last(trainer) if begun else None,
    )
    return trainer.global_step * settings.batch_size
