# ruff: noqa: D102 (overrides are described by their base class)
"""Samplers as parts that a config chooses: an ODE solver of `sampling.py`, its time steps and their number."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from lit_edm.edm.loss import Denoise
from lit_edm.edm.sampling import karras_sigmas, sample_dpmpp_2m, sample_euler, sample_heun
from lit_edm.edm.validation import check, check_positive


class Sampler(ABC):
    """Turns unit noise into samples."""

    @abstractmethod
    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        sigma_min: float,
        sigma_max: float,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Returns samples (B, C, H, W).

        Args:
            denoise: D(x; sigma).
            noise: What to start from, of unit variance, (B, C, H, W).
            sigma_min: Last noise level before 0, > 0.
            sigma_max: First noise level, >= sigma_min.
            generator: Source of noise added on the way, where the sampler adds some; by default that of the device.
        """

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """How often denoise is called (the paper's NFE)."""


@dataclass(frozen=True)
class KarrasSampler(Sampler):
    """Follows the time steps of Eq. 5 with a solver that each subclass names, by default at one evaluation a step."""

    num_steps: int = 50
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_positive(self, "num_steps", "rho")

    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        sigma_min: float,
        sigma_max: float,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        sigmas = karras_sigmas(self.num_steps, sigma_min, sigma_max, self.rho)
        return self.solve(denoise, noise * sigmas[0], sigmas, generator)

    @property
    def evaluations(self) -> int:
        return self.num_steps

    @abstractmethod
    def solve(self, denoise: Denoise, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        """Integrates from x, noise of standard deviation sigmas[0], down the noise levels (N + 1,)."""


@dataclass(frozen=True)
class EulerSampler(KarrasSampler):
    """Euler's method: the deterministic DDIM sampler.

    Args:
        num_steps: Steps N, of one evaluation each, >= 1.
        rho: How much the steps gather at sigma_min, > 0.
    """

    def solve(self, denoise: Denoise, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        return sample_euler(denoise, x, sigmas)


@dataclass(frozen=True)
class HeunSampler(KarrasSampler):
    """Heun's method: Algorithm 1, and with churn Algorithm 2.

    Args:
        num_steps: Steps N, of two evaluations each but for the last, >= 1.
        rho: How much the steps gather at sigma_min, > 0.
        s_churn: Amount of new noise over all steps, >= 0; none by default.
        s_tmin: Least noise level to add noise at.
        s_tmax: Greatest noise level to add noise at.
        s_noise: Standard deviation of the new noise, slightly above 1 against lost detail; > 0.
    """

    num_steps: int = 20
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "s_noise")
        check(self, "s_churn", 0 <= self.s_churn < inf, "finite and not negative")
        check(self, "s_tmax", self.s_tmax >= self.s_tmin, f"at least s_tmin = {self.s_tmin}")

    @property
    def evaluations(self) -> int:
        return 2 * self.num_steps - 1

    def solve(self, denoise: Denoise, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        return sample_heun(denoise, x, sigmas, self.s_churn, self.s_tmin, self.s_tmax, self.s_noise, generator)


@dataclass(frozen=True)
class DPMSolverSampler(KarrasSampler):
    """DPM-Solver++(2M): second order at one evaluation a step. Playground v2.5 recommends it, at 50 steps.

    Args:
        num_steps: Steps N, of one evaluation each, >= 1.
        rho: How much the steps gather at sigma_min, > 0.
    """

    def solve(self, denoise: Denoise, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        return sample_dpmpp_2m(denoise, x, sigmas)
