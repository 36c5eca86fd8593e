"""What a reader of a log wants to know of a run before it begins, in a line each."""

from collections.abc import Mapping
from math import ceil, inf, isinf
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_edm.batch import SummarizesImages
from lit_edm.callbacks.freeze_embeddings import FreezeEmbeddings
from lit_edm.callbacks.pictures import PictureCallback
from lit_edm.callbacks.run_length import RunLength
from lit_edm.callbacks.run_settings import described_optimizer, images_in_a_step
from lit_edm.callbacks.train_during import phases_of

SIZES_SHOWN = 6


def images_of(trainer: Trainer) -> str:
    """Tells how many images there are of which kind."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, SummarizesImages):
        return ""
    told = data.summary()
    facts = [f"{told['images']:,}"]
    if told["prior"]:
        rendered = f", {len(told['to_render']):,} of them to be rendered" if told["to_render"] else ""
        facts.append(f"{told['prior']:,} of a prior{rendered}")
    if told["masks"]:
        facts.append(f"{told['masks']:,} with a mask")
    if told["held_out"]:
        facts.append(f"{told['held_out']:,} held out")
    return "; ".join([*facts, f"{told['examples']:,} examples an epoch"])


def sizes_of(trainer: Trainer) -> str:
    """Tells how many images are trained on in each height and width, the most frequent first."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, SummarizesImages):
        return ""
    sizes = sorted(data.summary()["sizes"].items(), key=lambda size: (-size[1], size[0]))
    shown = [f"{height} x {width}: {count:,}" for (height, width), count in sizes[:SIZES_SHOWN]]
    if rest := sizes[SIZES_SHOWN:]:
        shown.append(f"{len(rest)} more: {sum(count for _, count in rest):,}")
    return ", ".join(shown)


def steps_of(trainer: Trainer, length: RunLength) -> str:
    """Tells how long the run is, and what a step is made of."""
    facts = ["without end" if isinf(length.steps) else f"{length.steps:,.0f}"]
    if each := images_in_a_step(trainer):
        facts.append(f"{each} images each")
    if not isinf(length.batches):
        facts.append(f"{length.batches:,.0f} batches an epoch")
    if not isinf(length.epochs):
        facts.append(f"{length.epochs:,.0f} epoch{'s' if length.epochs > 1 else ''}")
    return ", ".join(facts)


def trained_by(module: LightningModule) -> str:
    """Tells how many numbers are trained of each group, and how many are not trained."""
    groups = getattr(module, "parameter_groups", dict)()
    counts = {name: sum(parameter.numel() for parameter in parameters) for name, parameters in groups.items()}
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in module.parameters() if not parameter.requires_grad)
    if rest := trained - sum(counts.values()):
        counts["loss" if counts else "all"] = rest
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) + f" values; {frozen:,} frozen"


def optimized_by(trainer: Trainer) -> str:
    """Tells the optimizer, its learning rates, their schedule, and the precision."""
    optimizers = [described_optimizer(optimizer) for optimizer in trainer.optimizers]
    schedules = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    return ", ".join([*optimizers, *schedules, str(trainer.precision)])


def phases(trainer: Trainer, module: LightningModule, steps: float) -> str:
    """Tells the steps that train each group, from the first to the one after the last; empty if all train all."""
    groups: Mapping[str, Any] = getattr(module, "parameter_groups", dict)()
    spans = {group: [phase.span(steps) for phase in phases_of(trainer, group)] for group in groups}
    if not any(spans.values()):
        return ""
    told = [
        f"{group} {ceil(first)}-{'' if isinf(last := min(end, steps)) else ceil(last)}"
        for group, of_group in spans.items()
        for first, end in of_group or [(0, inf)]
    ]
    pivots = [callback for callback in trainer.callbacks if isinstance(callback, FreezeEmbeddings)]  # type: ignore[attr-defined]
    told += [f"the pivot is step {ceil(pivot.span(steps)[1])}" for pivot in pivots if 0 < pivot.span(steps)[1] < steps]
    return ", ".join(told)


def kept_when(trainer: Trainer) -> str:
    """Tells how often checkpoints and pictures are made."""
    told = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint):
            steps, epochs = callback._every_n_train_steps, callback._every_n_epochs
            told.append(f"checkpoints every {f'{steps:,} steps' if steps else f'{epochs:,} epochs'}")
        elif isinstance(callback, PictureCallback):
            every = f", every {callback.every_n_steps:,} steps," if callback.every_n_steps else ""
            told.append(f"pictures before{every} and after training")
    return "; ".join(told)
