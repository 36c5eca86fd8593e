"""Merging the updates of one layer by peft's add_weighted_adapter."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import skip_init

from lit_edm.errors import InputError
from lit_edm.sdxl.updates import LayerUpdate, LoRAUpdate


@dataclass(frozen=True)
class WeightedSum(LayerUpdate):
    """s sum of w_i Delta W_i, each the difference to the base's own weight, whatever kinds the updates have.

    Args:
        parts: Weight and update of each adapter.
        scale: s.
    """

    parts: tuple[tuple[float, LayerUpdate], ...]
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The sum of the ranks."""
        return sum(update.rank for _, update in self.parts)

    @property
    def size(self) -> tuple[int, int]:
        """The weight's size as a matrix."""
        return self.parts[0][1].size

    def product(self) -> Tensor:
        """Returns the sum of the products, without magnitudes."""
        return self.scale * torch.stack([weight * update.product() for weight, update in self.parts]).sum(0)

    def delta(self, weight: Tensor) -> Tensor:
        """Returns the sum of what each would add to the base's weight."""
        return self.scale * torch.stack([share * update.delta(weight) for share, update in self.parts]).sum(0)

    def factors(self) -> dict[str, Tensor]:
        """Raises an InputError, for no file of adapters has a place for a sum."""
        raise InputError("a sum of updates of several kinds has no factors; write it into a base")


def as_matrices(update: LayerUpdate) -> LoRAUpdate:
    """Returns an update as s B A of matrices, one of them the identity where it has no low rank."""
    if isinstance(update, LoRAUpdate):
        return LoRAUpdate(update.a.float().flatten(1), update.b.float().flatten(1), update.scale)
    product = update.product()
    rows, columns = product.shape
    if rows <= columns:
        return LoRAUpdate(product, torch.eye(rows))
    return LoRAUpdate(torch.eye(columns), product)


def padded(update: LoRAUpdate, rank: int) -> LoRAUpdate:
    """Returns matrices of the same product of a higher rank."""
    more = rank - update.rank
    return replace(update, a=functional.pad(update.a, (0, 0, 0, more)), b=functional.pad(update.b, (0, more)))


def zero_like(update: LoRAUpdate) -> LoRAUpdate:
    """Returns matrices of the same sizes that change nothing."""
    return replace(update, a=torch.zeros_like(update.a), b=torch.zeros_like(update.b))


def merged(
    updates: Sequence[LoRAUpdate], weights: Sequence[float], device: str = "cpu", **settings: Any
) -> tuple[Tensor, Tensor]:
    """Returns A (r, in) and B (out, r), merged by peft's add_weighted_adapter on a linear layer that has nothing else.

    Args:
        updates: Matrices s B A; of a single one peft merges linearly, whatever the settings say.
        weights: One for each update.
        device: Where the work is done.
        settings: Of add_weighted_adapter: combination_type, svd_rank, density, majority_sign_method.
    """
    from peft import LoraConfig, get_peft_model

    names = [f"adapter_{index}" for index in range(len(updates))]
    rows, columns = updates[0].size
    network = nn.ModuleDict({"layer": skip_init(nn.Linear, columns, rows, bias=False, device=device)})
    configs = [
        LoraConfig(r=u.rank, lora_alpha=u.scale * u.rank, target_modules=["layer"], init_lora_weights=False)  # type: ignore[arg-type]
        for u in updates
    ]
    model = get_peft_model(network, configs[0], names[0])  # type: ignore[arg-type]
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    layer: Any = network["layer"]
    for name, update in zip(names, updates, strict=True):
        layer.lora_A[name].weight.data.copy_(update.a)
        layer.lora_B[name].weight.data.copy_(update.b)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density")  # of 1, which keeps all
        model.add_weighted_adapter(names, list(weights), "merged", svd_full_matrices=False, **settings)
    return layer.lora_A["merged"].weight.data.cpu(), layer.lora_B["merged"].weight.data.cpu()
