# ruff: noqa: D102 (overrides are described by their base class)
"""Loss weighting row of Table 1 in Karras et al. (2022), and the weightings of other papers in the same terms.

Every lambda(sigma) is the weight of |D - y|^2. With r = sigma_data^2 / sigma^2, the signal-to-noise ratio:

    weighting       lambda sigma_data^2    weight of the error of EDM's network F
    EDM             r + 1                  1
    SNR             r                      r / (r + 1)
    min-SNR-gamma   min(r, gamma)          min(r, gamma) / (r + 1)
    soft-min-SNR    r / (r + 1)            r / (r + 1)^2
    truncated SNR   max(r, 1)              max(r, 1) / (r + 1)
    unit            sigma_data^2           sigma_data^2 / (r + 1)
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_edm.edm.validation import check, check_positive


class LossWeighting(ABC):
    """Weighs the squared error of the denoiser at each noise level."""

    @abstractmethod
    def __call__(self, sigma: Tensor) -> Tensor:
        """Returns lambda(sigma) of shape (B,), the weight of |D - y|^2."""

    def weigh(self, error: Tensor, sigma: Tensor) -> Tensor:
        """Returns the losses (B,) of squared errors (B,) at noise levels sigma (B,)."""
        return self(sigma) * error


@dataclass(frozen=True)
class EDMWeighting(LossWeighting):
    """lambda = 1 / c_out^2, so that every noise level weighs the same at initialization (Table 1, column "Ours").

    Args:
        sigma_data: RMS of the clean latents, > 0.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_positive(self, "sigma_data")

    def __call__(self, sigma: Tensor) -> Tensor:
        return 1 / sigma**2 + 1 / self.sigma_data**2


@dataclass(frozen=True)
class SNRWeighting(LossWeighting):
    """lambda = 1 / sigma^2: the plain squared error of eps (Table 1, columns "VP", "VE" and "iDDPM")."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return 1 / sigma**2


@dataclass(frozen=True)
class MinSNRWeighting(LossWeighting):
    """lambda = min(r, gamma) / sigma_data^2 (Hang et al. 2023): the squared error of D where r < gamma is that of eps.

    Times the squared error of eps it is min(r, gamma) / r, times that of v it is min(r, gamma) / (r + 1).

    Args:
        gamma: Greatest signal-to-noise ratio r that counts, > 0.
        sigma_data: RMS of the clean latents, > 0; 1 for the eps- and v-predicting SDXL.
    """

    gamma: float = 5.0
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "gamma", "sigma_data")

    def __call__(self, sigma: Tensor) -> Tensor:
        return _snr(sigma, self.sigma_data).clamp(max=self.gamma) / self.sigma_data**2


@dataclass(frozen=True)
class SoftMinSNRWeighting(LossWeighting):
    """lambda = 1 / (sigma^2 + sigma_data^2) (Crowson et al. 2024): min-SNR with gamma = 1 without its corner.

    Args:
        sigma_data: RMS of the clean latents, > 0.
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "sigma_data")

    def __call__(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 + self.sigma_data**2)


@dataclass(frozen=True)
class TruncatedSNRWeighting(LossWeighting):
    """lambda = max(r, 1) / sigma_data^2 (Salimans and Ho 2022): SNR that does not vanish at high noise.

    Args:
        sigma_data: RMS of the clean latents, > 0.
    """

    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "sigma_data")

    def __call__(self, sigma: Tensor) -> Tensor:
        return _snr(sigma, self.sigma_data).clamp(min=1) / self.sigma_data**2


@dataclass(frozen=True)
class UnitWeighting(LossWeighting):
    """lambda = 1: the plain squared error of D."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


class LearnedWeighting(nn.Module, LossWeighting):
    """Divides by the loss that is usual at each sigma, learned along: lambda / e^u |D - y|^2 + u (Karras et al. 2024).

    At the optimum e^u(sigma) = E[lambda |D - y|^2 | sigma], so that every noise level weighs the same throughout
    training. u is a linear layer on random Fourier features of ln(sigma) / 4, zero at first, and wants no weight decay.

    Args:
        weighting: lambda(sigma).
        num_features: Fourier features of u.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, weighting: LossWeighting = EDMWeighting(), num_features: int = 128) -> None:
        super().__init__()
        self.weighting = weighting
        self.num_features = num_features
        check(self, "num_features", num_features > 0, "positive")
        if (sigma_data := getattr(weighting, "sigma_data", None)) is not None:
            self.sigma_data: float = sigma_data
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(num_features))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_features))
        self.weight = nn.Parameter(torch.zeros(num_features))

    def forward(self, sigma: Tensor) -> Tensor:
        """Returns lambda(sigma) / e^u(sigma) of shape (B,)."""
        return self.weighting(sigma) * (-self.log_loss(sigma)).exp()

    def weigh(self, error: Tensor, sigma: Tensor) -> Tensor:
        return self(sigma) * error + self.log_loss(sigma)

    def log_loss(self, sigma: Tensor) -> Tensor:
        """Returns u(sigma) of shape (B,)."""
        c_noise = sigma.log()[:, None] / 4
        features = math.sqrt(2) * (self.frequencies * c_noise + self.phases).cos()
        return (features * self.weight).sum(dim=1)  # not a matrix product, which autocast would do in half precision


def _snr(sigma: Tensor, sigma_data: float) -> Tensor:
    """Returns r = sigma_data^2 / sigma^2."""
    return (sigma_data / sigma) ** 2
