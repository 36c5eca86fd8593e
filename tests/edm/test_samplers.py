"""What the solvers do is in test_sampling.py; here: which one, on which noise levels, and how often it evaluates."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_edm.edm import (
    Denoise,
    DPMSolverSampler,
    EDMPreconditioning,
    EulerSampler,
    HeunSampler,
    Sampler,
    append_dims,
    karras_sigmas,
    sample_dpmpp_2m,
    sample_euler,
    sample_heun,
)

Solver = Callable[[Denoise, Tensor, Tensor], Tensor]
SOLVERS: list[tuple[Sampler, Solver]] = [
    (EulerSampler(7, 3.0), sample_euler),
    (HeunSampler(7, 3.0), sample_heun),
    (DPMSolverSampler(7, 3.0), sample_dpmpp_2m),
]
NOISE = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
MEANS = torch.tensor([-0.7, 0.1, 0.8])


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of numbers of three normal laws with standard deviation 0.2, far from linear in x."""
    distance = x[..., None] - MEANS.to(x)
    variance = 0.2**2 + append_dims(sigma, x.ndim + 1) ** 2
    share = (-distance.square() / (2 * variance)).softmax(-1)
    return (share * (MEANS.to(x) + distance * 0.2**2 / variance)).sum(-1)


@pytest.mark.parametrize(("sampler", "solver"), SOLVERS)
def test_a_solver_on_the_steps_of_equation_5(sampler: Sampler, solver: Solver) -> None:
    sigmas = karras_sigmas(7, 0.03, 14.6, 3.0)
    assert sampler(denoise, NOISE, 0.03, 14.6).equal(solver(denoise, NOISE * sigmas[0], sigmas))


@pytest.mark.parametrize("sampler", [sampler for sampler, _ in SOLVERS])
def test_evaluations_are_counted_right(sampler: Sampler) -> None:
    calls: list[float] = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(sigma[0].item())
        return denoise(x, sigma)

    sampler(counted, NOISE, 0.03, 14.6)
    assert len(calls) == sampler.evaluations
    assert calls[0] == pytest.approx(14.6)
    assert min(calls) == pytest.approx(0.03)


def test_evaluations_of_defaults() -> None:
    assert [sampler.evaluations for sampler in (EulerSampler(), HeunSampler(), DPMSolverSampler())] == [50, 39, 50]


def test_churn_is_algorithm_2_with_noise_of_the_generator() -> None:
    churn = (20.0, 0.05, 10.0, 1.003)
    sampler, sigmas = HeunSampler(9, 7.0, *churn), karras_sigmas(9, 0.002, 80.0)
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    expected = sample_heun(denoise, NOISE * sigmas[0], sigmas, *churn, generator=other)
    assert sampler(denoise, NOISE, 0.002, 80.0, one).equal(expected)
    assert not sampler(denoise, NOISE, 0.002, 80.0, one).equal(expected)
    assert sampler.evaluations == 17


def playground(num_steps: int, **settings: Any) -> Tensor:
    """Samples with diffusers' scheduler, whose defaults are Playground v2.5's configuration."""
    from diffusers import EDMDPMSolverMultistepScheduler

    scheduler, precondition, x = EDMDPMSolverMultistepScheduler(**settings), EDMPreconditioning(0.5), NOISE * 80.0
    scheduler.set_timesteps(num_steps)
    for sigma, t in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        scalings = precondition(sigma.expand(len(x)))
        c_skip, c_out = (append_dims(c, x.ndim) for c in (scalings.c_skip, scalings.c_out))
        network = (denoise(x, sigma.expand(len(x))) - c_skip * x) / c_out  # the F of which Eq. 7 makes this D
        x = scheduler.step(network, t, x).prev_sample
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 5, 14, 15, 50])
def test_dpm_solver_is_the_one_that_playground_recommends(num_steps: int) -> None:
    """To rounding: in float32 both are within 1e-6 of ours in float64, where samples are about 1."""
    ours = DPMSolverSampler(num_steps)(denoise, NOISE, 0.002, 80.0)
    torch.testing.assert_close(ours, playground(num_steps), rtol=0, atol=3e-6)


def test_other_solvers_of_as_many_evaluations_are_not() -> None:
    expected = playground(50)
    assert (playground(50, solver_type="heun") - expected).abs().max() > 1e-3
    for sampler in (EulerSampler(50), HeunSampler(25), DPMSolverSampler(50, rho=5.0)):
        assert (sampler(denoise, NOISE, 0.002, 80.0) - expected).abs().max() > 1e-3


def test_dpm_solver_takes_noise_levels_from_80_to_0_002_in_50_steps() -> None:
    from diffusers import EDMDPMSolverMultistepScheduler

    scheduler = EDMDPMSolverMultistepScheduler()
    scheduler.set_timesteps(50)
    levels: list[Tensor] = []
    DPMSolverSampler()(lambda x, sigma: levels.append(sigma[0]) or denoise(x, sigma), NOISE, 0.002, 80.0)
    torch.testing.assert_close(torch.stack(levels), scheduler.sigmas[:-1], rtol=1e-5, atol=0)
    assert all(a > b for a, b in pairwise(levels))
