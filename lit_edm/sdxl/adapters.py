"""Which parameters of the UNet are trained."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_edm.errors import InputError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class Adapter(ABC):
    """Makes part of a frozen UNet trainable. Every trainable value must be float32: bf16 swallows small updates."""

    @abstractmethod
    def __call__(self, unet: "UNet2DConditionModel") -> None:
        """Adds or unfreezes parameters in place."""


@dataclass(frozen=True)
class LoRA(Adapter):
    """Trains low-rank updates W + (alpha / rank) B A of some layers (Hu et al., 2021), by peft.

    Args:
        rank: Rank of the updates, at least 1.
        alpha: The update is scaled by alpha / rank; the rank if not given.
        target_modules: Names of the layers to update, matched at the end of their full names.
    """

    rank: int = 8
    alpha: float | None = None
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"model.init_args.adapter.init_args.rank is {self.rank}; it must be 1 or more")

    def __call__(self, unet: "UNet2DConditionModel") -> None:
        """Adds the updates to the UNet, which starts out unchanged (B = 0).

        Raises:
            InputError: No layer has one of the target names.
        """
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        if missing := [name for name in self.target_modules if not has_layer(unet, name)]:
            raise InputError(
                f"model.init_args.adapter.init_args.target_modules: the UNet has no layer called {missing[0]}; "
                "its attention layers are to_q, to_k, to_v and to_out.0"
            )
        alpha = self.rank if self.alpha is None else self.alpha
        config = LoraConfig(r=self.rank, lora_alpha=alpha, target_modules=list(self.target_modules))  # type: ignore[arg-type]
        unet.add_adapter(config)
        cast_training_params(unet)


def has_layer(unet: "UNet2DConditionModel", name: str) -> bool:
    """Tells whether a layer's full name is, or ends with, a name."""
    return any(path == name or path.endswith(f".{name}") for path, _ in unet.named_modules())
