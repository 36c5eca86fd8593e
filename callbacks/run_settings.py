"""What a reader of a model card wants to know of a run, in a few words each."""

import math
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from lightning.pytorch import Trainer

from lit_edm.modules import SDXLModule
from lit_edm.sdxl.low_rank import LowRankAdapter

PLAIN = bool | int | float | str | tuple | list | dict | None


def run_settings(trainer: Trainer, module: SDXLModule) -> dict[str, str]:
    """Returns the settings that matter of a run, by what they are about; what the run does not have is left out."""
    images: Any = getattr(trainer, "datamodule", None)
    settings = {
        "UNet": described_adapter(module.adapter),
        "text encoders": described_adapter(module.text_encoder_adapter),
        "new tokens": ", ".join(f"{word} = {''.join(names)}" for word, names in module.placeholders.tokens.items()),
        "loss": described(module.loss),
        **{name: described(part) for name, part in parts_of(module.loss).items()},
        "preconditioning": described(module.preconditioning),
        "optimizer": ", ".join(map(described_optimizer, trainer.optimizers)),
        "learning rate schedule": ", ".join(type(c.scheduler).__name__ for c in trainer.lr_scheduler_configs),
        "optimizer steps": str(trainer.global_step),
        "images in a step": images_in_a_step(trainer),
        "resolution": f"{images.resolution} px" if hasattr(images, "resolution") else "",
        "precision": str(trainer.precision),
    }
    return {name: value for name, value in settings.items() if value}


def images_in_a_step(trainer: Trainer) -> str:
    """Returns how many images an optimizer step learns from, and how that came about; empty if it cannot be told."""
    if (batch_size := getattr(getattr(trainer, "datamodule", None), "batch_size", None)) is None:
        return ""
    counts = {"a batch": batch_size, "batches": trainer.accumulate_grad_batches, "devices": trainer.world_size}
    parts = " x ".join(f"{count} {name}" for name, count in counts.items() if name == "a batch" or count > 1)
    total = math.prod(counts.values())
    return f"{total} ({parts})" if total > batch_size else str(total)


def described_optimizer(optimizer: Any) -> str:
    """Returns class and learning rates of an optimizer, before any schedule."""
    rates = dict.fromkeys(f"{group.get('initial_lr', group['lr']):g}" for group in optimizer.param_groups)
    return f"{type(optimizer).__name__}(lr={', '.join(rates)})"


def described_adapter(adapter: object) -> str:
    """Returns an adapter as Python would make it, alpha spelled out where it is the rank; empty for none."""
    text = described(adapter)
    return f"{text[:-1]}, alpha=rank)" if isinstance(adapter, LowRankAdapter) and adapter.alpha is None else text


def described(part: object) -> str:
    """Returns a part as Python would make it, without its own parts and what is off; empty for none."""
    if part is None:
        return ""
    given = [f"{f.name}={getattr(part, f.name)!r}" for f in fields_of(part) if matters(part, f)]
    return f"{type(part).__name__}({', '.join(given)})"


def matters(part: object, field: Field[Any]) -> bool:
    """Tells whether a plain setting of a part is another than its default, or a default number that is at work."""
    value = getattr(part, field.name)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    at_work = isinstance(value, int | float) and not isinstance(value, bool) and value not in (0, math.inf)
    return isinstance(value, PLAIN) and (value != default or at_work)


def parts_of(part: object) -> dict[str, object]:
    """Returns the settings of a part that are parts themselves, such as the noise and the weighting of a loss."""
    values = {field.name: getattr(part, field.name) for field in fields_of(part)}
    return {name: value for name, value in values.items() if not isinstance(value, PLAIN)}


def fields_of(part: object) -> list[Field[Any]]:
    """Returns the settings of a dataclass; a class of another kind keeps its own to itself."""
    return [field for field in fields(part) if field.init] if is_dataclass(part) else []
