"""Sampling rows of the design space (Karras et al. 2022, Sections 3 and 4): error against calls of the denoiser (NFE).

The denoiser is exact, so all error is the sampler's. Two data sets have one in closed form: a Gaussian, whose
probability flow ODE has a closed solution as well, and finitely many points. All is computed in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lit_edm.edm import (
    Denoise,
    IDDPMTrajectory,
    Trajectory,
    VETrajectory,
    VPTrajectory,
    karras_sigmas,
    sample_dpmpp_2m,
    sample_euler,
    sample_heun,
    sample_trajectory,
)

NFE = [5, 9, 17, 35, 65, 129, 255]
"""Calls of the denoiser, all odd: what Heun's method takes."""
RHO = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0]
"""Exponents of the steps of Eq. 5, compared at 35 calls."""
SIGMA_DATA = 0.5
"""Standard deviation of the Gaussian: the paper's sigma_data."""
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
S_CHURN = 40.0
COLUMNS: dict[str, Trajectory] = {"VP": VPTrajectory(), "VE": VETrajectory(), "iDDPM": IDDPMTrajectory()}


@dataclass(frozen=True)
class Sampler:
    """A way from noise to samples.

    Args:
        sigma_max: Noise level it starts from.
        solve: Maps D(x; sigma), noise (B, D) of unit variance and a number of steps N to samples (B, D).
        heun: Whether it takes 2 N - 1 calls of the denoiser and not N.
    """

    sigma_max: float
    solve: Callable[[Denoise, Tensor, int], Tensor]
    heun: bool = True

    def __call__(self, denoise: Denoise, noise: Tensor, nfe: int) -> Tensor:
        """Returns samples (B, D) after as many calls of the denoiser."""
        return self.solve(denoise, noise, (nfe + 1) // 2 if self.heun else nfe)


def samplers() -> dict[str, Sampler]:
    """Returns each column's own sampler, the same with Heun's method, and with EDM's steps too; then EDM's own.

    Every column keeps its range of noise levels, as in the paper's Figure 2.
    """
    found = {}
    for name, column in COLUMNS.items():
        sigma_max, sigma_min = column.sigma(column.time_steps(2)[:2]).tolist()
        edm_steps = partial(times_of_edm_steps, column, sigma_min, sigma_max)
        found[name] = Sampler(sigma_max, partial(follow, column, column.time_steps, False), heun=False)
        found[f"{name} + Heun"] = Sampler(sigma_max, partial(follow, column, column.time_steps, True))
        found[f"{name} + Heun + EDM steps"] = Sampler(sigma_max, partial(follow, column, edm_steps, True))
    found["EDM, Euler"] = Sampler(SIGMA_MAX, partial(descend, sample_euler, 7.0), heun=False)
    found["EDM, Heun"] = edm_heun(7.0)
    found["EDM, DPM-Solver++(2M)"] = Sampler(SIGMA_MAX, partial(descend, sample_dpmpp_2m, 7.0), heun=False)
    return found


def edm_heun(rho: float) -> Sampler:
    """Returns the paper's deterministic sampler with steps of another exponent."""
    return Sampler(SIGMA_MAX, partial(descend, sample_heun, rho))


def times_of_edm_steps(column: Trajectory, sigma_min: float, sigma_max: float, num_steps: int) -> Tensor:
    """Returns the times (N + 1,) at which a column reaches the noise levels of Eq. 5."""
    sigmas = karras_sigmas(num_steps, sigma_min, sigma_max, dtype=torch.float64)
    return torch.cat([column.time(sigmas[:-1]), sigmas[-1:]])


def follow(
    column: Trajectory, times: Callable[[int], Tensor], heun: bool, denoise: Denoise, noise: Tensor, num_steps: int
) -> Tensor:
    """Samples along the sigma(t) and s(t) of a column."""
    steps = times(num_steps)
    return sample_trajectory(denoise, noise * column.s(steps[0]) * column.sigma(steps[0]), column, steps, heun)


def descend(
    method: Callable[[Denoise, Tensor, Tensor], Tensor], rho: float, denoise: Denoise, noise: Tensor, num_steps: int
) -> Tensor:
    """Samples with sigma(t) = t, s(t) = 1 and the steps of Eq. 5."""
    sigmas = karras_sigmas(num_steps, SIGMA_MIN, SIGMA_MAX, rho, torch.float64)
    return method(denoise, noise * sigmas[0], sigmas)


def gaussian(sigma_data: float) -> Denoise:
    """Returns the exact denoiser of N(0, sigma_data^2)."""
    return lambda x, sigma: x * (sigma_data**2 / (sigma_data**2 + sigma**2))[:, None]


def finite(points: Tensor) -> Denoise:
    """Returns the exact denoiser of points (M, D): D(x; sigma) = softmax_i(-|x - y_i|^2 / (2 sigma^2)) . y_i."""
    half_squares = points.square().sum(1) / 2

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        logits = (x @ points.T - half_squares) / sigma[:, None] ** 2  # |x|^2 / 2 is the same for every point
        return logits.softmax(1) @ points

    return denoise


def gaussian_error(sampler: Sampler, nfe: int) -> float:
    """Returns the relative error of the samples' standard deviation, all there is where samplers are linear."""
    exact = sampler.sigma_max * SIGMA_DATA / math.hypot(SIGMA_DATA, sampler.sigma_max)
    unit = torch.ones(1, 1, dtype=torch.float64)
    return abs(sampler(gaussian(SIGMA_DATA), unit, nfe).item() / exact - 1)


def churn_error(nfe: int, count: int) -> float:
    """Returns the same for Algorithm 2 with churn, of so many samples: to 1 / sqrt(2 count)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 1, dtype=torch.float64, generator=generator)
    churned = Sampler(SIGMA_MAX, partial(descend, partial(sample_heun, s_churn=S_CHURN, generator=generator), 7.0))
    return abs(churned(gaussian(SIGMA_DATA), noise, nfe).std().item() / SIGMA_DATA - 1)


class FiniteError:
    """The RMS difference, over pixels and samples, to the solution of the same ODE from the same noise.

    Args:
        points: The data set (M, D).
        count: Number of samples.
        reference_steps: Steps of Heun's method that stand for the solution, on the grid of Eq. 5.
    """

    def __init__(self, points: Tensor, count: int, reference_steps: int = 500) -> None:
        self.denoise = finite(points)
        self.noise = torch.randn(count, points.shape[1], dtype=points.dtype, generator=torch.Generator().manual_seed(0))
        self.reference_steps = reference_steps
        self.solution = cache(self._solve)

    def __call__(self, sampler: Sampler, nfe: int) -> float:
        """Returns the error of a sampler."""
        return rms(sampler(self.denoise, self.noise, nfe) - self.solution(sampler.sigma_max, self.reference_steps))

    def of_reference(self) -> float:
        """Returns how far the solution moves when its steps are halved in number."""
        coarse = self.solution(SIGMA_MAX, self.reference_steps // 2)
        return rms(coarse - self.solution(SIGMA_MAX, self.reference_steps))

    def _solve(self, sigma_max: float, num_steps: int) -> Tensor:
        sigmas = karras_sigmas(num_steps, SIGMA_MIN, sigma_max, dtype=torch.float64)
        return sample_heun(self.denoise, self.noise * sigma_max, sigmas)


def rms(x: Tensor) -> float:
    """Returns the root of the mean square."""
    return x.square().mean().sqrt().item()


def compare_samplers(points: Tensor, count: int = 256, churn_count: int = 2**18) -> dict[str, Any]:
    """Returns every sampler's error against NFE on both data sets, and that of EDM's against rho.

    Args:
        points: Finite data set (M, D), float64.
        count: Samples of it.
        churn_count: Samples of the Gaussian with churn, where samples do not follow from their noise.
    """
    finite_error, columns = FiniteError(points, count), samplers()
    errors: dict[str, dict[str, list[float]]] = {"gaussian": {}, "digits": {}}
    for name, sampler in columns.items():
        errors["gaussian"][name] = [gaussian_error(sampler, nfe) for nfe in NFE]
        errors["digits"][name] = [finite_error(sampler, nfe) for nfe in NFE]
        print(f"{name}: {errors['digits'][name][NFE.index(35)]:.3f} at 35 NFE", flush=True)
    errors["gaussian"]["EDM, Heun, churn"] = [churn_error(nfe, churn_count) for nfe in NFE]
    return {
        "nfe": NFE,
        "errors": errors,
        "rho": RHO,
        "errors_of_rho": {
            "gaussian": [gaussian_error(edm_heun(rho), 35) for rho in RHO],
            "digits": [finite_error(edm_heun(rho), 35) for rho in RHO],
        },
        "samples": count,
        "churn": {"s_churn": S_CHURN, "samples": churn_count, "resolution": (2 * churn_count) ** -0.5},
        "reference": {"steps": finite_error.reference_steps, "error": finite_error.of_reference()},
    }
