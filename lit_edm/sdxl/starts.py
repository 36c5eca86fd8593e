"""Where the factors of a LoRA layer start: W + s B A, computed in float32 whatever the precision of W."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_edm.errors import InputError
from lit_edm.sdxl.adapters import InitialUpdate

Start = Literal["default", "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"]
FROM_WEIGHT = ("pissa", "pissa_niter_4", "olora")
"""Starts from a part of W, which is taken out of W at the same time."""


def check_start(start: Start, name: str, layer: nn.Module, rank: int, key: str) -> None:
    """Raises InputError if a layer cannot start so; key is the adapter's in the config."""
    if start in ("default", "gaussian"):
        return
    if not isinstance(layer, nn.Linear):
        raise InputError(f"{key}.init is {start}, but {name} is a convolution; write default or gaussian")
    if start == "orthogonal" and rank % 2:
        raise InputError(f"{key}.init is orthogonal, which wants an even rank, but {name} has rank {rank}")
    if start in FROM_WEIGHT and rank > min(layer.weight.shape):
        raise InputError(
            f"{key}.init is {start}, but {name} has rank {rank}, more than its weight {tuple(layer.weight.shape)} has; "
            f"write {min(layer.weight.shape)} or less"
        )


@torch.no_grad()
def start_from(start: Start, layer: Any) -> None:
    """Gives a LoRA layer the factors of a start that peft would round to the precision of W, or take out of W.

    Args:
        start: Which one; default and gaussian are peft's own.
        layer: The layer, whose update is 0.
    """
    if start in ("default", "gaussian"):
        return
    a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    weight = layer.get_base_layer().weight.float()
    if start == "orthogonal":
        first, second = orthogonal(*weight.shape, rank=len(a))
    elif start == "olora":
        first, second = triangular(weight, len(a))
    else:
        first, second = principal(weight, len(a), scale, exact=start == "pissa")
    a.copy_(first)
    b.copy_(second)
    if start in FROM_WEIGHT:
        layer.initial = InitialUpdate(a.clone(), scale * b)
        layer.register_forward_hook(layer.initial)


def principal(weight: Tensor, rank: int, scale: float, exact: bool) -> tuple[Tensor, Tensor]:
    """Returns A (rank, in) and B (out, rank) whose s B A is the largest part of W (PiSSA, Meng et al., 2024).

    Exact takes minutes for all of SDXL; otherwise four iterations of a randomised method do, which are near it.
    """
    if exact:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = torch.svd_lowrank(weight, rank, niter=4)
        right = right.T
    roots = (values[:rank] / scale).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def triangular(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns A (rank, in) and B (out, rank): first rows and columns of W = Q R (OLoRA, Büyükakyüz, 2024)."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def orthogonal(out_features: int, in_features: int, rank: int) -> tuple[Tensor, Tensor]:
    """Returns A (rank, in) and B (out, rank), neither of them 0, with B A = 0: through orthogonal halves of a basis."""
    even, odd = torch.linalg.qr(torch.randn(rank, rank)).Q.chunk(2)
    a = even.T @ torch.randn(rank // 2, in_features) / 10
    b = torch.randn(out_features, rank // 2) @ odd / 10
    return a, b
