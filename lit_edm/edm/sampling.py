"""Samplers of the probability flow ODE dx/dsigma = (x - D(x; sigma)) / sigma, Karras et al. (2022), Section 3 and 4.

Each starts from x ~ N(0, sigmas[0]^2), follows decreasing noise levels, usually down to 0, and returns x at the last.
They compute in the dtype of x, float32 or float64, and keep sigma on the host: the device is never waited for.
"""

import math
from itertools import pairwise
from math import inf

import torch
from torch import Tensor

from lit_edm.edm.loss import Denoise


def karras_sigmas(
    num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Returns the time steps of Eq. 5, decreasing from sigma_max to sigma_min and then 0, shape (N + 1,).

    Args:
        num_steps: Number of steps N, at least 1; a single step goes from sigma_max to 0.
        sigma_min: Last noise level before 0, > 0.
        sigma_max: First noise level, >= sigma_min.
        rho: How much the steps gather at sigma_min, > 0.
        dtype: Of the result, which is computed in float64.
    """
    if num_steps < 1 or not 0 < sigma_min <= sigma_max < inf or not 0 < rho < inf:
        raise ValueError(
            "karras_sigmas needs num_steps >= 1, 0 < sigma_min <= sigma_max and rho > 0, "
            f"got {num_steps=}, {sigma_min=}, {sigma_max=}, {rho=}"
        )
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64, device="cpu")
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = (first + ramp * (last - first)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).to(dtype)


@torch.no_grad()
def sample_euler(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """Integrates with Euler's method; the deterministic DDIM sampler. N calls of denoise.

    Args:
        denoise: D(x; sigma).
        x: Noise (B, ...) of standard deviation sigmas[0].
        sigmas: Decreasing noise levels (N + 1,).
    """
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        x = x + (sigma_next - sigma) * _derivative(denoise, x, sigma)
    return x


@torch.no_grad()
def sample_heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = inf,
    s_noise: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Algorithm 2: Heun's method, with new noise added before each step; Algorithm 1 if s_churn = 0. NFE = 2 N - 1.

    Args:
        denoise: D(x; sigma).
        x: Noise (B, ...) of standard deviation sigmas[0].
        sigmas: Decreasing noise levels (N + 1,).
        s_churn: Amount of new noise over all steps, >= 0.
        s_tmin: Least noise level to add noise at.
        s_tmax: Greatest noise level to add noise at.
        s_noise: Standard deviation of the new noise, slightly above 1 against lost detail.
        generator: Source of the new noise, by default that of the device.
    """
    gamma_max = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        gamma = gamma_max if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * _randn_like(x, generator)
        derivative = _derivative(denoise, x, sigma_hat)
        x_next = x + (sigma_next - sigma_hat) * derivative
        if sigma_next > 0:
            derivative = (derivative + _derivative(denoise, x_next, sigma_next)) / 2
            x_next = x + (sigma_next - sigma_hat) * derivative
        x = x_next
    return x


@torch.no_grad()
def sample_dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """DPM-Solver++(2M), Algorithm 2 of Lu et al. (2022b): second order at N calls of denoise.

    D is extrapolated linearly in ln(sigma) from the step before; the first step, and one to sigma = 0, take D as it is.

    Args:
        denoise: D(x; sigma).
        x: Noise (B, ...) of standard deviation sigmas[0].
        sigmas: Decreasing noise levels (N + 1,).
    """
    previous, last_h = None, 0.0
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        denoised = target = denoise(x, _level(x, sigma))
        h = math.log(sigma / sigma_next) if sigma_next > 0 else inf
        if previous is not None and sigma_next > 0:
            target = denoised + (denoised - previous) * h / (2 * last_h)
        x = target + (x - target) * (sigma_next / sigma)
        previous, last_h = denoised, h
    return x


def _level(x: Tensor, sigma: float) -> Tensor:
    """Returns sigma for every example of x, shape (B,)."""
    return x.new_full((len(x),), sigma)


def _derivative(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    """Returns dx/dsigma, Eq. 3."""
    return (x - denoise(x, _level(x, sigma))) / sigma


def _randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws N(0, I) in the shape of x where the generator lives, and moves it to x."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device)
