# ruff: noqa: D102 (overrides are described by their base class)
"""Noise distribution row of Table 1 in Karras et al. (2022): which noise levels a network is trained at."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import inf, log, sqrt

import torch
from torch import Tensor

from lit_edm.edm.schedule import TimestepSchedule, iddpm_sigmas, vp_sigma
from lit_edm.edm.validation import check, check_positive, check_sigma_range


class NoiseDistribution(ABC):
    """Draws the noise levels a batch is trained at."""

    @abstractmethod
    def __call__(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Returns sigma of shape (B,), float32, on the device."""

    def importance(self, sigma: Tensor) -> Tensor:
        """Returns p(sigma) / q(sigma) of shape (B,) for the law p to train on and the law q drawn from."""
        return torch.ones_like(sigma)

    def observe(self, sigma: Tensor, loss: Tensor) -> None:  # noqa: B027 (most laws learn nothing)
        """Learns from the losses (B,) seen at sigma (B,)."""


class InverseTransform(NoiseDistribution):
    """A distribution drawn by its quantile function.

    It is evaluated in float64 on the CPU: exact in the tails, and the same on every device (Apple's has no float64).
    Moving sigma over does not make the host wait for the device.
    """

    @property
    def num_values(self) -> int:
        """How many equally likely values a discrete law has; 0 for a continuous one."""
        return 0

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Returns the sigma below which a share u of all draws lies; u in (0, 1), float64, of any shape."""

    def __call__(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        return self.at(uniform((batch_size,), generator), device)

    def at(self, u: Tensor, device: torch.device) -> Tensor:
        """Returns the noise levels at quantiles u in [0, 1], float32, on the device."""
        return self.quantile(u.clamp(2.0**-54, 1 - 2.0**-53)).float().to(device, non_blocking=True)


@dataclass(frozen=True)
class LogNormal(InverseTransform):
    """ln(sigma) ~ N(p_mean, p_std^2) (Table 1, column "Ours"), given that sigma_min <= sigma <= sigma_max.

    Truncation is exact: the law is that of drawing again until sigma lies in range.

    Args:
        p_mean: Mean of ln(sigma) before truncation.
        p_std: Standard deviation of ln(sigma) before truncation, > 0.
        sigma_min: Least noise level, >= 0.
        sigma_max: Greatest noise level, > sigma_min, may be infinite.
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.0
    sigma_max: float = inf

    def __post_init__(self) -> None:
        check(self, "p_mean", -inf < self.p_mean < inf, "finite")
        check_positive(self, "p_std")
        check_sigma_range(self)

    def quantile(self, u: Tensor) -> Tensor:
        bounds = torch.tensor([self.sigma_min, self.sigma_max], dtype=u.dtype, device=u.device)
        bounds = (bounds.log() - self.p_mean) / self.p_std
        sign = -1 if bounds[0] > 0 else 1  # a CDF is exact near 0 and rounds near 1: use the lower tail
        low, high = torch.special.erfc(-sign * bounds / sqrt(2)) / 2  # and not ndtr, whose lower tail is inexact, too
        return (self.p_mean + self.p_std * sign * torch.special.ndtri(low + u * (high - low))).exp()


@dataclass(frozen=True)
class ScaledLogNormal(InverseTransform):
    """The paper's log-normal law for latents of another RMS: P_mean = -1.2 + ln(sigma_data / 0.5), P_std = 1.2.

    Args:
        sigma_data: RMS of the clean latents, > 0.
        sigma_min: Least noise level, >= 0.
        sigma_max: Greatest noise level, > sigma_min, may be infinite.
    """

    sigma_data: float = 1.0
    sigma_min: float = 0.0
    sigma_max: float = inf

    def __post_init__(self) -> None:
        check_positive(self, "sigma_data")
        check_sigma_range(self)

    @cached_property
    def law(self) -> LogNormal:
        """The law itself."""
        return LogNormal(-1.2 + log(self.sigma_data / 0.5), 1.2, self.sigma_min, self.sigma_max)

    def quantile(self, u: Tensor) -> Tensor:
        return self.law.quantile(u)


@dataclass(frozen=True)
class MatchedLogNormal(InverseTransform):
    """The log-normal law with the moments that uniform timesteps give ln(sigma), truncated to the timesteps' range.

    For SDXL P_mean = 0.483 and P_std = 1.194: EDM's kind of law where the network was pretrained.

    Args:
        schedule: Noise level of each timestep.
    """

    schedule: TimestepSchedule = TimestepSchedule()

    @cached_property
    def law(self) -> LogNormal:
        """The law itself; the moments are those before truncation."""
        std, mean = torch.std_mean(self.schedule.sigmas().log(), correction=0)
        return LogNormal(mean.item(), std.item(), self.schedule.sigma_min, self.schedule.sigma_max)

    def quantile(self, u: Tensor) -> Tensor:
        return self.law.quantile(u)


@dataclass(frozen=True)
class LogUniform(InverseTransform):
    """ln(sigma) ~ U(ln(sigma_min), ln(sigma_max)) (Table 1, column "VE").

    Args:
        sigma_min: Least noise level, > 0.
        sigma_max: Greatest noise level, > sigma_min.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        check_positive(self, "sigma_min", "sigma_max")
        check_sigma_range(self)

    def quantile(self, u: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** u


@dataclass(frozen=True)
class UniformTimesteps(InverseTransform):
    """sigma = sigma_t, t ~ U{0, ..., T - 1}: how SDXL was trained, every sigma an entry of its table.

    Args:
        schedule: Noise level of each timestep.
    """

    schedule: TimestepSchedule = TimestepSchedule()

    @property
    def num_values(self) -> int:
        return self.schedule.num_timesteps

    def quantile(self, u: Tensor) -> Tensor:
        return _entry(self.schedule.sigmas(u.device), u)


@dataclass(frozen=True)
class UniformKarras(InverseTransform):
    """sigma uniform on the time steps of Eq. 5: sigma^(1/rho) ~ U(sigma_min^(1/rho), sigma_max^(1/rho)).

    Args:
        sigma_min: Least noise level, > 0.
        sigma_max: Greatest noise level, > sigma_min.
        rho: How much the noise levels gather at sigma_min, > 0.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_positive(self, "sigma_min", "sigma_max", "rho")
        check_sigma_range(self)

    def quantile(self, u: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + u * (high - low)) ** self.rho


@dataclass(frozen=True)
class VPNoise(InverseTransform):
    """sigma^-1(sigma) ~ U(epsilon_t, 1) (Table 1, column "VP").

    Args:
        beta_d: Slope of beta(t), > 0.
        beta_min: beta(0), > 0.
        epsilon_t: Least time, in (0, 1).
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def __post_init__(self) -> None:
        check_positive(self, "beta_d", "beta_min")
        check(self, "epsilon_t", 0 < self.epsilon_t < 1, "in (0, 1)")

    def quantile(self, u: Tensor) -> Tensor:
        return vp_sigma(self.epsilon_t + u * (1 - self.epsilon_t), self.beta_d, self.beta_min)


@dataclass(frozen=True)
class IDDPMNoise(InverseTransform):
    """sigma = u_j, j ~ U{0, ..., M - 1} (Table 1, column "iDDPM + DDIM").

    Args:
        c1: Least ratio of successive alpha_bar, > 0.
        c2: Offset of the cosine schedule, > 0.
        num_timesteps: Timesteps M.
    """

    c1: float = 0.001
    c2: float = 0.008
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        check_positive(self, "c1", "c2", "num_timesteps")

    @property
    def num_values(self) -> int:
        return self.num_timesteps

    def quantile(self, u: Tensor) -> Tensor:
        return _entry(iddpm_sigmas(self.num_timesteps, self.c1, self.c2, u.device).flip(0), u)


def _entry(sigmas: Tensor, u: Tensor) -> Tensor:
    """Returns the entries of an increasing table at quantiles u."""
    return sigmas[(u * len(sigmas)).long().clamp(max=len(sigmas) - 1)]


def uniform(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Draws from U[0, 1) in float64, on the CPU or where the generator lives."""
    device = "cpu" if generator is None else generator.device
    return torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
