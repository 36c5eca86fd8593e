# ruff: noqa: D102 (overrides are described by their base class)
"""The loss of Karras et al. (2022), Section 5.

Notation: y is a clean latent, n noise, x = y + n, and D(x; sigma) the denoiser.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from math import inf

import torch
from torch import Tensor, nn

from lit_edm.edm.draws import drawn, unit_noise_like
from lit_edm.edm.noise import LogNormal, NoiseDistribution
from lit_edm.edm.shapes import append_dims
from lit_edm.edm.validation import check
from lit_edm.edm.weighting import EDMWeighting, LossWeighting

Denoise = Callable[[Tensor, Tensor], Tensor]
"""D(x; sigma): maps x (B, C, H, W) and sigma (B,) to the denoised latent (B, C, H, W)."""

Target = Callable[[Tensor, Tensor, Tensor], Tensor]
"""What D is compared with: maps x (B, C, H, W), sigma (B,) and the clean latent y (B, C, H, W) to (B, C, H, W)."""


class DiffusionLoss(ABC):
    """Scores a denoiser on a batch of clean latents.

    A loss of one's own that takes the first two arguments alone serves where there are no masks and no teacher.
    """

    @abstractmethod
    def __call__(
        self, denoise: Denoise, clean: Tensor, target: Target | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Scores a denoiser.

        Args:
            denoise: D(x; sigma).
            clean: Clean latents y (B, C, H, W).
            target: What D is to give; y if none is given.
            mask: Weight of the squared error at each place, (B, 1, H, W); 1 if none is given.

        Returns:
            One loss per example, shape (B,).
        """

    def stateful_parts(self) -> list[nn.Module]:
        """Returns the parts with parameters or buffers, which the training module must register."""
        return _modules(self)


@dataclass(frozen=True)
class EDMLoss(DiffusionLoss):
    """lambda(sigma) |D(y + n; sigma) - y|^2: the denoising error of Eq. 2, weighted as in Section 5.

    The loss is a mean over C, H and W. It is computed in float32 whatever the precision of y and of the network.
    Neither option makes sigma untrue: each element of the noise n has standard deviation sigma throughout.

    Args:
        noise: Distribution of sigma.
        weighting: lambda(sigma).
        noise_offset: Share c >= 0 of noise that is constant over each channel, so that a network learns to change the
            brightness of the whole image: n = sigma (e + c o) / sqrt(1 + c^2), with e drawn at each place, o for each
            channel.
        input_perturbation: Strength g >= 0 of noise that is taken for part of the image (Ning et al. 2023), so that a
            network learns to live with its own errors: y + g sigma e is in the place of y, as what noise is added to
            and as what D is to give, which for eps is the paper's loss.
    """

    noise: NoiseDistribution = LogNormal()
    weighting: LossWeighting = EDMWeighting()
    noise_offset: float = 0.0
    input_perturbation: float = 0.0

    def __post_init__(self) -> None:
        check(self, "noise_offset", 0 <= self.noise_offset < inf, "finite and not negative")
        check(self, "input_perturbation", 0 <= self.input_perturbation < inf, "finite and not negative")

    def __call__(
        self, denoise: Denoise, clean: Tensor, target: Target | None = None, mask: Tensor | None = None
    ) -> Tensor:
        clean = clean.to(torch.promote_types(clean.dtype, torch.float32))
        sigma = drawn(len(clean), lambda count: self.noise(count, clean.device))
        level = append_dims(sigma, clean.ndim)
        if self.input_perturbation:
            clean = clean + self.input_perturbation * level * unit_noise_like(clean)
        noisy = clean + level * self._unit_noise(clean)
        wanted = clean if target is None else target(noisy, sigma, clean)
        square = (denoise(noisy, sigma) - wanted).square()
        error = (square if mask is None else square * mask).flatten(1).mean(1)
        loss = self.noise.importance(sigma) * self.weighting.weigh(error, sigma)
        self.noise.observe(sigma, (self.weighting(sigma) * error).detach())
        return loss

    def _unit_noise(self, clean: Tensor) -> Tensor:
        noise = unit_noise_like(clean)
        if not self.noise_offset:
            return noise
        offset = append_dims(unit_noise_like(clean, axes=2), clean.ndim)
        return (noise + self.noise_offset * offset) / (1 + self.noise_offset**2) ** 0.5


def _modules(part: object) -> list[nn.Module]:
    """Returns the modules among a part and the parts it is made of."""
    if isinstance(part, nn.Module):
        return [part]
    nested = [getattr(part, field.name) for field in fields(part)] if is_dataclass(part) else []
    return [module for child in nested for module in _modules(child)]
