# ruff: noqa: D102 (overrides are described by their base class)
"""Network and preconditioning rows of Table 1 in Karras et al. (2022)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_edm.edm.schedule import TimestepSchedule, iddpm_sigmas, vp_time
from lit_edm.edm.shapes import append_dims
from lit_edm.edm.validation import check_positive


class Scalings(NamedTuple):
    """The four coefficients of Eq. 7, each of shape (B,)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


class Preconditioning(ABC):
    """Maps noise levels to the scalings around the network F."""

    sigma_data: float = 1.0
    """RMS of the clean latents that the scalings assume."""

    @abstractmethod
    def __call__(self, sigma: Tensor) -> Scalings:
        """Returns the scalings at noise levels sigma (B,), in the dtype of sigma."""

    def denoise(self, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), Eq. 7, in float32 around a network of any precision.

        Args:
            network: F, called with its scaled input (B, ...) and c_noise (B,).
            x: Noisy latents (B, ...), at least float32.
            sigma: Noise levels (B,), at least float32.
        """
        c_skip, c_out, c_in, c_noise = self(sigma)
        c_skip, c_out, c_in = (append_dims(c, x.ndim) for c in (c_skip, c_out, c_in))
        return c_skip * x + c_out * network(c_in * x, c_noise)


@dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """Keeps the network's input and target at unit variance (Table 1, column "Ours"; Playground v2.5).

    Args:
        sigma_data: RMS of the clean latents, > 0.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_positive(self, "sigma_data")

    def __call__(self, sigma: Tensor) -> Scalings:
        total = (sigma**2 + self.sigma_data**2).sqrt()
        return Scalings(
            c_skip=(self.sigma_data / total) ** 2,
            c_out=sigma * self.sigma_data / total,
            c_in=1 / total,
            c_noise=_log(sigma) / 4,
        )


@dataclass(frozen=True)
class EpsPreconditioning(Preconditioning):
    """An eps-predicting network as a denoiser: D(x; sigma) = x - sigma F(x / sqrt(sigma^2 + 1); t(sigma)). SDXL.

    Args:
        schedule: Noise level of each of the network's timesteps.
    """

    schedule: TimestepSchedule = TimestepSchedule()

    def __call__(self, sigma: Tensor) -> Scalings:
        return Scalings(torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), self.schedule.timestep(sigma))


@dataclass(frozen=True)
class VelocityPreconditioning(Preconditioning):
    """A v-predicting network (Salimans and Ho 2022) as a denoiser; F is minus that of EDM with sigma_data = 1.

    Args:
        schedule: Noise level of each of the network's timesteps.
    """

    schedule: TimestepSchedule = TimestepSchedule()

    def __call__(self, sigma: Tensor) -> Scalings:
        c_in = (sigma**2 + 1).rsqrt()
        return Scalings(c_in**2, -sigma * c_in, c_in, self.schedule.timestep(sigma))


@dataclass(frozen=True)
class VPPreconditioning(Preconditioning):
    """Table 1, column "VP" (Song et al. 2021, DDPM++).

    Args:
        beta_d: Slope of beta(t), > 0.
        beta_min: beta(0), > 0.
        num_timesteps: Timesteps M that c_noise counts, from 0 to M - 1.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        check_positive(self, "beta_d", "beta_min", "num_timesteps")

    def __call__(self, sigma: Tensor) -> Scalings:
        c_noise = (self.num_timesteps - 1) * vp_time(sigma, self.beta_d, self.beta_min)
        return Scalings(torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), c_noise)


@dataclass(frozen=True)
class VEPreconditioning(Preconditioning):
    """Table 1, column "VE" (Song et al. 2021, NCSN++)."""

    def __call__(self, sigma: Tensor) -> Scalings:
        one = torch.ones_like(sigma)
        return Scalings(one, sigma, one, _log(sigma / 2))


@dataclass(frozen=True)
class IDDPMPreconditioning(Preconditioning):
    """Table 1, column "iDDPM + DDIM" (Nichol and Dhariwal 2021).

    Args:
        c1: Least ratio of successive alpha_bar, > 0.
        c2: Offset of the cosine schedule, > 0.
        num_timesteps: Timesteps M of the network.
    """

    c1: float = 0.001
    c2: float = 0.008
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        check_positive(self, "c1", "c2", "num_timesteps")

    def __call__(self, sigma: Tensor) -> Scalings:
        u = iddpm_sigmas(self.num_timesteps, self.c1, self.c2, sigma.device)
        c_noise = self.num_timesteps - 1 - (u - sigma[:, None]).abs().argmin(dim=1).to(sigma.dtype)
        return Scalings(torch.ones_like(sigma), -sigma, (sigma**2 + 1).rsqrt(), c_noise)


def _log(sigma: Tensor) -> Tensor:
    """ln(sigma), finite at sigma = 0."""
    return sigma.clamp(min=torch.finfo(sigma.dtype).tiny).log()
