"""What is said of optimizer steps whose loss or gradient is not finite."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, isnan
from textwrap import shorten

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lit_edm.optim import effective_rates

QUOTED_CAPTIONS = 4
"""Captions that a message quotes."""

CAPTION_LENGTH = 80
"""Letters of each."""


@dataclass(frozen=True)
class Seen:
    """What one process saw of an optimizer step.

    Args:
        losses: Loss of each batch that the step accumulates; as the gradient scales it, if there is a scaler.
        captions: Captions of each.
        last_loss: Last finite loss before the step; NaN if there was none.
    """

    losses: Sequence[float]
    captions: Sequence[Sequence[str]]
    last_loss: float

    @property
    def is_finite(self) -> bool:
        """Whether all of the losses are."""
        return all(isfinite(loss) for loss in self.losses)


def moment(trainer: Trainer) -> str:
    """Says when."""
    return f"at step {trainer.global_step} of epoch {trainer.current_epoch}"


def describe(seen: Sequence[Seen], groups: Sequence[str]) -> str:
    """Says what was not finite, and of which captions."""
    batches = [batch for each in seen for batch in zip(each.losses, each.captions, strict=True)]
    broken = [(loss, captions) for loss, captions in batches if not isfinite(loss)]
    loss = f"the loss was {broken[0][0]}" if broken else "the loss was finite"
    gradient = f"the gradient of {', '.join(groups)} was not finite"
    captions = [caption for _, captions in broken or batches for caption in captions]
    return f"{loss} and {gradient}{quoted(captions)}"


def quoted(captions: Sequence[str]) -> str:
    """Quotes the first of several captions."""
    if not captions:
        return ""
    first = [repr(shorten(caption, CAPTION_LENGTH, placeholder=" ...")) for caption in captions[:QUOTED_CAPTIONS]]
    others = f" and {len(captions) - len(first)} more" if len(captions) > len(first) else ""
    return f", with the captions {', '.join(first)}{others}"


def circumstances(trainer: Trainer, optimizer: Optimizer, last_loss: float) -> str:
    """Says what else may have led to it."""
    last = "no loss was finite before" if isnan(last_loss) else f"the last finite loss was {last_loss:g}"
    rates = ", ".join(f"{name} {rate:g}" for name, rate in effective_rates(optimizer).items())
    return f"{last}, learning rates are {rates}, trainer.precision is {trainer.precision}"


def remedy(trainer: Trainer) -> str:
    """Says what helps most often."""
    if trainer.precision == "16-mixed":
        return (
            "set trainer.precision to bf16-mixed, or model.init_args.vae to madebyollin/sdxl-vae-fp16-fix, for SDXL's "
            "own VAE overflows in half precision"
        )
    clipping = "" if trainer.gradient_clip_val else ", or set trainer.gradient_clip_val to 1.0"
    return f"lower model.init_args.optimizer.init_args.lr{clipping}"


def way_back(trainer: Trainer) -> str:
    """Says that nothing is lost, and where it is."""
    keepers = trainer.checkpoint_callbacks
    paths = [getattr(keeper, kind, "") for keeper in keepers for kind in ("last_model_path", "best_model_path")]
    newest = next((path for path in paths if path), None)
    if newest is None:
        return "these steps moved no weight; no checkpoint was written"
    return f"these steps moved no weight: go on from {newest}, or from an older one if the step before was too large"
