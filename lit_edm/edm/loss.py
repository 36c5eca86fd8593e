# ruff: noqa: D102 (overrides are described by their base class)
"""The loss of Karras et al. (2022), Section 5.

Notation: y is a clean latent, n noise, x = y + n, and D(x; sigma) the denoiser.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor, nn

from lit_edm.edm.noise import LogNormal, NoiseDistribution
from lit_edm.edm.shapes import append_dims
from lit_edm.edm.weighting import EDMWeighting, LossWeighting

Denoise = Callable[[Tensor, Tensor], Tensor]
"""D(x; sigma): maps x (B, C, H, W) and sigma (B,) to the denoised latent (B, C, H, W)."""


class DiffusionLoss(ABC):
    """Scores a denoiser on a batch of clean latents."""

    @abstractmethod
    def __call__(self, denoise: Denoise, clean: Tensor) -> Tensor:
        """Returns one loss per example, shape (B,), from clean latents (B, C, H, W)."""

    def stateful_parts(self) -> list[nn.Module]:
        """Returns the parts with parameters or buffers, which the training module must register."""
        return _modules(self)


@dataclass(frozen=True)
class EDMLoss(DiffusionLoss):
    """lambda(sigma) |D(y + n; sigma) - y|^2: the denoising error of Eq. 2, weighted as in Section 5.

    The loss is a mean over C, H and W. It is computed in float32 whatever the precision of y and of the network.

    Args:
        noise: Distribution of sigma.
        weighting: lambda(sigma).
    """

    noise: NoiseDistribution = LogNormal()
    weighting: LossWeighting = EDMWeighting()

    def __call__(self, denoise: Denoise, clean: Tensor) -> Tensor:
        clean = clean.to(torch.promote_types(clean.dtype, torch.float32))
        sigma = self.noise(len(clean), clean.device)
        noisy = clean + append_dims(sigma, clean.ndim) * torch.randn_like(clean)
        error = (denoise(noisy, sigma) - clean).square().flatten(1).mean(1)
        loss = self.noise.importance(sigma) * self.weighting.weigh(error, sigma)
        self.noise.observe(sigma, (self.weighting(sigma) * error).detach())
        return loss


def _modules(part: object) -> list[nn.Module]:
    """Returns the modules among a part and the parts it is made of."""
    if isinstance(part, nn.Module):
        return [part]
    nested = [getattr(part, field.name) for field in fields(part)] if is_dataclass(part) else []
    return [module for child in nested for module in _modules(child)]
