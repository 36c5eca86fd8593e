"""What a run will take of its device's memory."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lit_edm.batch import DescribesImages, SummarizesImages
from lit_edm.callbacks.ema import ExponentialMovingAverage
from lit_edm.modules import EDMModule, SDXLModule
from lit_edm.sdxl import FullFinetune
from lit_edm.sdxl.memory import (
    GIB,
    TrainingMemory,
    bytes_kept,
    bytes_of,
    kept_by_text_encoder,
    kept_by_unet,
    nothing,
    state_of,
)

ROOM_FOR_OTHERS = 1.0
"""GiB of a device for what TrainingMemory leaves out."""


def training_memory(trainer: Trainer, module: LightningModule) -> TrainingMemory:
    """Estimates what training takes while most is trained: before any phase lets something rest."""
    data = getattr(trainer, "datamodule", None)
    trained = bytes_of(parameter for parameter in module.parameters() if parameter.requires_grad)
    away = {id(parameter) for network in away_from_device(module, data) for parameter in network.parameters()}
    averages = [c for c in trainer.callbacks if isinstance(c, ExponentialMovingAverage)]  # type: ignore[attr-defined]
    return TrainingMemory(
        frozen=bytes_of(p for p in module.parameters() if not p.requires_grad and id(p) not in away),
        trained=trained,
        optimizer=sum(state_of(optimizer) for optimizer in trainer.optimizers),
        average=trained * len(averages),
        activations=activations(module, data),
    )


def away_from_device(module: LightningModule, data: Any) -> Sequence[nn.Module]:
    """Returns the networks that leave the device before training, as what they say is kept."""
    if not isinstance(module, SDXLModule):
        return []
    latents = getattr(data, "latent_cache", None) is not None and isinstance(data, SummarizesImages)
    fixed = module.text_cache is not None and not module.conditioner.learns
    texts = fixed and isinstance(data, DescribesImages) and not data.captions_vary
    return [network for network, gone in ((module.latents, latents), (module.conditioner, texts)) if gone]


def activations(module: LightningModule, data: Any) -> int | None:
    """Counts what a batch of the largest images has the networks keep for the backward pass; None if it cannot."""
    count = getattr(data, "batch_size", None)
    if isinstance(module, SDXLModule) and isinstance(data, DescribesImages) and count:
        return activations_of_sdxl(module, count, max(data.sizes(), key=lambda size: size[0] * size[1]))
    if isinstance(module, EDMModule) and count:
        dtype = module.network_dtype()
        label = None if module.num_classes is None else nothing(count, dtype=torch.int64)
        images = nothing(count, *module.image_shape, dtype=dtype)
        return bytes_kept(module.network, dtype, images, nothing(count, dtype=dtype), label)
    return None


def activations_of_sdxl(module: SDXLModule, count: int, size: tuple[int, int]) -> int | None:
    """Counts what UNet and text encoders keep of so many images of a height and width in pixels."""
    dtype, learns = module.network_dtype(), module.conditioner.learns
    kept = [kept_by_unet(module.denoiser.unet, dtype, (count, *module.latents.shape(*size)), learns)]
    if learns:
        kept += [kept_by_text_encoder(encoder, dtype, count) for encoder in module.conditioner.encoders]
    known = [part for part in kept if part is not None]
    return sum(known) if len(known) == len(kept) else None


def too_large(memory: TrainingMemory, there: int, module: LightningModule, data: Any) -> str | None:
    """Returns a warning that says what to do, if a device has less memory than training takes."""
    if memory.total <= there:
        return None
    remedies = []
    checkpointing = getattr(module, "gradient_checkpointing", True)
    if checkpointing is False:
        room = (there - memory.total + (memory.activations or 0)) / GIB - ROOM_FOR_OTHERS
        budget = f", or to {room:.1f}, the GiB that are left for activations" if room >= 0.1 else ""
        remedies.append(f"set model.init_args.gradient_checkpointing to true{budget}")
    elif checkpointing is not True:
        remedies.append("lower model.init_args.gradient_checkpointing, or set it to true")
    if getattr(data, "batch_size", 1) > 1:
        remedies.append("lower data.init_args.batch_size, and raise trainer.accumulate_grad_batches for it")
    if isinstance(module, SDXLModule) and str(module._trainer and module.trainer.precision) == "32-true":
        remedies.append("set trainer.precision to bf16-mixed")
    if isinstance(module, SDXLModule) and getattr(data, "latent_cache", module) is None:
        remedies.append("give data.init_args.latent_cache, so that the VAE leaves the device")
    if isinstance(module, SDXLModule) and module.quantization is None and not isinstance(module.adapter, FullFinetune):
        remedies.append("set model.init_args.quantization to int8")
    advice = "; ".join(remedies) or "train less of it, or on smaller images"
    return f"training takes about {memory.total / GIB:.1f} GiB, and the device has {there / GIB:.1f}: {advice}"
