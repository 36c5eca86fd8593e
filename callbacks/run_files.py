"""What a run will write, and how much of it."""

from collections.abc import Iterator
from math import isinf
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lit_edm.batch import DescribesImages, SummarizesImages
from lit_edm.callbacks.disk_room import Files
from lit_edm.callbacks.run_length import RunLength
from lit_edm.callbacks.save_adapter import SaveAdapter
from lit_edm.callbacks.validation_images import ValidationImages
from lit_edm.files import readable
from lit_edm.modules import SDXLModule
from lit_edm.sdxl.formats import trains_weights
from lit_edm.sdxl.memory import TrainingMemory

PIXEL = 3
"""Bytes that a pixel takes in a PNG at most."""


def caches(trainer: Trainer, module: LightningModule) -> Iterator[Files]:
    """Yields what is kept of images and captions, and what of it is to be made."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(module, SDXLModule):
        return
    if isinstance(data, SummarizesImages) and (found := data.latents_to_keep(module.latents.fingerprint)):
        count = sum(found["missing"].values())
        size = sum(number * latent_size(module, *side) for side, number in found["missing"].items())
        note = f"{count:,} of {count + found['kept']:,} to be encoded"
        yield Files(
            "latents", folder_of(found["folder"]), size, note, "name another folder in data.init_args.latent_cache"
        )
    if isinstance(data, DescribesImages) and module.text_cache is not None and not data.captions_vary:
        captions = data.captions()
        learns = module.conditioner.learns
        missing = captions if learns else module.conditioner.missing(captions)
        note = (
            f"{len(missing):,} of {len(captions):,} to be encoded{', once nothing learns from them' if learns else ''}"
        )
        folder = None if learns else getattr(module.text_cache, "folder", None)
        size = len(missing) * text_size(module)
        yield Files("texts", folder_of(folder), size, note, "name another folder in model.init_args.text_cache")


def folder_of(name: str | None) -> Path | None:
    """Returns a folder that a config names."""
    return None if name is None else Path(name).expanduser()


def latent_size(module: SDXLModule, height: int, width: int) -> int:
    """Returns the bytes of mean and log-variance of an image's latents, float32."""
    channels, rows, columns = module.latents.shape(height, width)
    return 2 * 4 * channels * rows * columns


def text_size(module: SDXLModule) -> int:
    """Returns the bytes of an encoded text."""
    encoders: Any = module.conditioner.encoders
    first, second = (encoder.config for encoder in encoders)
    numbers = 77 * (first.hidden_size + second.hidden_size) + second.projection_dim
    return numbers * module.network_dtype().itemsize


def checkpoints(trainer: Trainer, length: RunLength, memory: TrainingMemory) -> Iterator[Files]:
    """Yields the checkpoints of each ModelCheckpoint: what is trained, its optimizer's state and its average."""
    size = memory.trained + memory.optimizer + memory.average
    for keeper in keepers(trainer):
        times = saves(keeper, length)
        kept = times if keeper.save_top_k == -1 else min(keeper.save_top_k, times)
        count = kept + bool(keeper.save_last) + 1  # one is there before that which it replaces is deleted
        advice = "lower ModelCheckpoint.save_top_k, or raise every_n_train_steps"
        note = f"{count:,} of {readable(size)}"
        yield Files("checkpoints", Path(str(keeper.dirpath)), count * size, note, advice, replaces=True)


def pictures(trainer: Trainer, folder: Path, length: RunLength) -> Iterator[Files]:
    """Yields the pictures of each ValidationImages in the folder of a run."""
    for callback in renderers(trainer):
        size = (2 + times_of(length.steps, callback.every_n_steps)) * pictures_size(callback)
        advice = "raise ValidationImages.every_n_steps"
        yield Files("pictures", folder / callback.folder, size, advice=advice, replaces=True)


def adapters(trainer: Trainer, module: LightningModule, folder: Path, length: RunLength) -> Iterator[Files]:
    """Yields what each SaveAdapter exports to the folder of a run, with every checkpoint and at the end."""
    times = 1 + max((saves(keeper, length) for keeper in keepers(trainer)), default=0)
    samples = sum(map(pictures_size, renderers(trainer)))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveAdapter) and isinstance(module, SDXLModule):
            size = len(callback.formats) * exported(module.networks()) + samples
            note, advice = f"{times:,} of {readable(size)}", "save fewer checkpoints, each of which has one"
            yield Files("adapters", folder / "adapter", times * size, note, advice, replaces=True)


def renderers(trainer: Trainer) -> list[ValidationImages]:
    """Returns the callbacks that write pictures of SDXL."""
    return [callback for callback in trainer.callbacks if isinstance(callback, ValidationImages)]  # type: ignore[attr-defined]


def pictures_size(callback: ValidationImages) -> int:
    """Returns the bytes of the pictures of a step."""
    return len(callback.prompts) * PIXEL * callback.resolution**2


def keepers(trainer: Trainer) -> list[ModelCheckpoint]:
    """Returns the callbacks that write checkpoints to a folder of this machine."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
    return [keeper for keeper in found if keeper.dirpath and "://" not in str(keeper.dirpath)]


def saves(keeper: ModelCheckpoint, length: RunLength) -> int:
    """Returns how often a run saves a checkpoint."""
    if every := keeper._every_n_train_steps:
        return times_of(length.steps, every)
    return max(1, times_of(length.epochs, keeper._every_n_epochs))


def times_of(length: float, every: int) -> int:
    """Returns how often something happens that does every so often, 0 for never; once if there is no end."""
    return 1 if isinf(length) else int(length // every) if every else 0


def exported(networks: dict[str, nn.Module]) -> int:
    """Returns the bytes of what is exported of networks, in float32: what is trained, or all of one that is itself."""
    return sum(
        4 * parameter.numel()
        for network in networks.values()
        for whole in [trains_weights(network)]
        for parameter in network.parameters()
        if parameter.requires_grad or whole
    )


def class_images(data: Any) -> Iterator[Files]:
    """Yields the class images that are to be rendered."""
    if not isinstance(data, SummarizesImages):
        return
    sizes: dict[Path, list[int]] = {}
    for path, (height, width) in data.summary()["to_render"]:
        sizes.setdefault(Path(path).parent, []).append(PIXEL * height * width)
    for folder, each in sizes.items():
        yield Files("class images", folder, sum(each), f"{len(each):,} to be rendered", "lower num_images of the prior")
