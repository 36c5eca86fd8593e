# ruff: noqa: D102 (overrides are described by their base class)
"""Sampling rows of Table 1 in Karras et al. (2022): any schedule sigma(t), scaling s(t) and time steps t_i.

A noisy latent is x(t) = s(t) (y + sigma(t) n). With sigma(t) = t and s(t) = 1, as for "iDDPM + DDIM" and "Ours", the
samplers of `sampling.py` do the same and are simpler.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lit_edm.edm.loss import Denoise
from lit_edm.edm.sampling import karras_sigmas
from lit_edm.edm.schedule import iddpm_sigmas, vp_sigma, vp_time
from lit_edm.edm.validation import check, check_positive, check_sigma_range


class Trajectory(ABC):
    """Schedule, scaling and time steps of a column of Table 1; t is a float64 tensor of any shape."""

    @abstractmethod
    def time_steps(self, num_steps: int) -> Tensor:
        """Returns t_0 > ... > t_N = 0, shape (N + 1,), float64."""

    def time(self, sigma: Tensor) -> Tensor:
        """Returns the times of noise levels sigma: the inverse of `sigma`."""
        return sigma

    def sigma(self, t: Tensor) -> Tensor:
        """Returns the noise level at times t."""
        return t

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Returns the derivative of the noise level at times t."""
        return torch.ones_like(t)

    def s(self, t: Tensor) -> Tensor:
        """Returns the scaling at times t."""
        return torch.ones_like(t)

    def s_dot(self, t: Tensor) -> Tensor:
        """Returns the derivative of the scaling at times t."""
        return torch.zeros_like(t)


@dataclass(frozen=True)
class VPTrajectory(Trajectory):
    """Table 1, column "VP".

    Args:
        beta_d: Slope of beta(t), > 0.
        beta_min: beta(0), > 0.
        epsilon_s: Last time before 0, in (0, 1).
    """

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_s: float = 1e-3

    def __post_init__(self) -> None:
        check_positive(self, "beta_d", "beta_min")
        check(self, "epsilon_s", 0 < self.epsilon_s < 1, "in (0, 1)")

    def time_steps(self, num_steps: int) -> Tensor:
        return _append_zero(1 + _ramp(num_steps) * (self.epsilon_s - 1))

    def time(self, sigma: Tensor) -> Tensor:
        return vp_time(sigma, self.beta_d, self.beta_min)

    def sigma(self, t: Tensor) -> Tensor:
        return vp_sigma(t, self.beta_d, self.beta_min)

    def sigma_dot(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return (self.beta_d * t + self.beta_min) * (sigma + 1 / sigma) / 2

    def s(self, t: Tensor) -> Tensor:
        return (1 + self.sigma(t) ** 2).rsqrt()

    def s_dot(self, t: Tensor) -> Tensor:
        return -(self.beta_d * t + self.beta_min) * self.s(t) / 2


@dataclass(frozen=True)
class VETrajectory(Trajectory):
    """Table 1, column "VE".

    Args:
        sigma_min: Last noise level before 0, > 0.
        sigma_max: First noise level, > sigma_min.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        check_positive(self, "sigma_min", "sigma_max")
        check_sigma_range(self)

    def time_steps(self, num_steps: int) -> Tensor:
        return _append_zero(self.sigma_max**2 * (self.sigma_min / self.sigma_max) ** (2 * _ramp(num_steps)))

    def time(self, sigma: Tensor) -> Tensor:
        return sigma**2

    def sigma(self, t: Tensor) -> Tensor:
        return t.sqrt()

    def sigma_dot(self, t: Tensor) -> Tensor:
        return t.rsqrt() / 2


@dataclass(frozen=True)
class IDDPMTrajectory(Trajectory):
    """Table 1, column "iDDPM + DDIM".

    Args:
        c1: Least ratio of successive alpha_bar, > 0.
        c2: Offset of the cosine schedule, > 0.
        num_timesteps: Timesteps M.
        j0: First timestep, in [0, M - 1]; at 8 the noise level is 80.
    """

    c1: float = 0.001
    c2: float = 0.008
    num_timesteps: int = 1000
    j0: int = 8

    def __post_init__(self) -> None:
        check_positive(self, "c1", "c2", "num_timesteps")
        check(self, "j0", 0 <= self.j0 < self.num_timesteps, f"in [0, {self.num_timesteps - 1}]")

    def time_steps(self, num_steps: int) -> Tensor:
        j = self.j0 + (self.num_timesteps - 1 - self.j0) * _ramp(num_steps)
        u = iddpm_sigmas(self.num_timesteps, self.c1, self.c2, torch.device("cpu")).double()
        return _append_zero(u[(j + 0.5).long()])


@dataclass(frozen=True)
class EDMTrajectory(Trajectory):
    """Table 1, column "Ours".

    Args:
        sigma_min: Last noise level before 0, > 0.
        sigma_max: First noise level, > sigma_min.
        rho: How much the steps gather at sigma_min, > 0.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_positive(self, "sigma_min", "sigma_max", "rho")
        check_sigma_range(self)

    def time_steps(self, num_steps: int) -> Tensor:
        return karras_sigmas(num_steps, self.sigma_min, self.sigma_max, self.rho, torch.float64)


@torch.no_grad()
def sample_trajectory(denoise: Denoise, x: Tensor, trajectory: Trajectory, times: Tensor, heun: bool = True) -> Tensor:
    """Integrates the ODE of Eq. 4 along a trajectory with Heun's (Algorithm 1) or Euler's method.

    Args:
        denoise: D(x; sigma).
        x: Noise (B, ...) of standard deviation s(t_0) sigma(t_0).
        trajectory: sigma(t) and s(t).
        times: Decreasing times (N + 1,), such as trajectory.time_steps(N).
        heun: Whether to correct every step that does not end at 0, for 2 N - 1 calls of denoise and not N.
    """
    times = times.double().cpu()
    for t, t_next in pairwise(times):
        derivative = _derivative(denoise, x, trajectory, t)
        x_next = x + (t_next - t) * derivative
        if heun and t_next > 0:
            derivative = (derivative + _derivative(denoise, x_next, trajectory, t_next)) / 2
            x_next = x + (t_next - t) * derivative
        x = x_next
    return x


def _derivative(denoise: Denoise, x: Tensor, trajectory: Trajectory, t: Tensor) -> Tensor:
    """Returns dx/dt = (s'/s + sigma'/sigma) x - s sigma'/sigma D(x/s; sigma), Eq. 4 with Eq. 3 in it."""
    sigma, s = trajectory.sigma(t), trajectory.s(t)
    growth = trajectory.sigma_dot(t) / sigma
    denoised = denoise(x / s, x.new_full((len(x),), sigma.item()))
    return (trajectory.s_dot(t) / s + growth) * x - s * growth * denoised


def _ramp(num_steps: int) -> Tensor:
    """Returns i / (N - 1) for i < N."""
    return torch.linspace(0, 1, num_steps, dtype=torch.float64, device="cpu")


def _append_zero(times: Tensor) -> Tensor:
    """Appends t_N = 0."""
    return torch.cat([times, times.new_zeros(1)])
