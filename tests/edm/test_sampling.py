import math
from collections.abc import Callable
from itertools import pairwise
from math import inf

import pytest
import torch
from torch import Tensor

from lit_edm.edm import (
    Denoise,
    EpsPreconditioning,
    TimestepSchedule,
    append_dims,
    guided,
    karras_sigmas,
    sample_dpmpp_2m,
    sample_euler,
    sample_heun,
)

SAMPLERS = [sample_euler, sample_heun, sample_dpmpp_2m]
Sampler = Callable[[Denoise, Tensor, Tensor], Tensor]
F64 = torch.float64


def gaussian(sigma_data: float = 0.5, mean: float = 0.0) -> Denoise:
    """The exact denoiser of N(mean, sigma_data^2)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return mean + (x - mean) * append_dims(sigma_data**2 / (sigma_data**2 + sigma**2), x.ndim)

    return denoise


def finite(points: Tensor) -> Denoise:
    """The exact denoiser of a data set (M, D)."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        distance = (x[:, None] - points).square().sum(-1)
        return (-distance / (2 * sigma[:, None] ** 2)).softmax(-1) @ points

    return denoise


def counted(denoise: Denoise, levels: list[Tensor]) -> Denoise:
    """Keeps the noise levels that a denoiser is called at."""

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        levels.append(sigma)
        return denoise(x, sigma)

    return call


def output_std(sampler: Sampler, sigmas: Tensor) -> float:
    """Standard deviation of samples of N(0, 0.25): the samplers are linear, so one number shows it."""
    return sampler(gaussian(), sigmas[:1, None].clone(), sigmas).item()


def test_karras_steps_are_those_of_equation_5() -> None:
    sigmas = karras_sigmas(18, 0.002, 80.0, dtype=F64)
    first = torch.tensor([80, 57.5859847212, 40.7855737965, 28.3745846042, 19.3524529803], dtype=F64)
    last = torch.tensor([0.0229345183723, 0.00752801996278, 0.002, 0], dtype=F64)
    torch.testing.assert_close(sigmas[:5], first, rtol=1e-11, atol=0)
    torch.testing.assert_close(sigmas[-4:], last, rtol=1e-11, atol=0)
    assert sigmas.shape == (19,)
    assert torch.equal(karras_sigmas(18, 0.002, 80.0), sigmas.float())


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_steps_are_even_in_their_root(rho: float) -> None:
    steps = (karras_sigmas(10, 0.03, 14.6, rho, F64)[:-1] ** (1 / rho)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(9), rtol=1e-10, atol=0)


def test_the_shortest_karras_steps() -> None:
    torch.testing.assert_close(karras_sigmas(1, 0.002, 80.0), torch.tensor([80.0, 0.0]))
    torch.testing.assert_close(karras_sigmas(1, 3.0, 3.0), torch.tensor([3.0, 0.0]))


@pytest.mark.parametrize(
    "wrong", [(0, 0.002, 80.0), (5, 0.0, 80.0), (5, 1.0, 0.5), (5, 0.1, inf), (5, 0.1, 1.0, 0.0), (5, 0.1, 1.0, inf)]
)
def test_karras_steps_refuse_what_makes_no_sense(wrong: tuple) -> None:
    with pytest.raises(ValueError, match="karras_sigmas needs"):
        karras_sigmas(*wrong)


def test_known_standard_deviations_of_samples() -> None:
    sigmas = karras_sigmas(18, 0.002, 80.0, dtype=F64)
    assert output_std(sample_heun, sigmas) == pytest.approx(0.527624637001, rel=1e-11)
    assert output_std(sample_euler, sigmas) == pytest.approx(0.423031436408, rel=1e-11)


@pytest.mark.parametrize(("sampler", "order"), [(sample_euler, 1), (sample_heun, 2), (sample_dpmpp_2m, 2)])
def test_order_of_convergence(sampler: Sampler, order: int) -> None:
    """The exact solution for Gaussian data keeps x / sqrt(sigma_data^2 + sigma^2)."""
    exact = 80 * math.sqrt((0.25 + 0.002**2) / (0.25 + 80**2))
    grids = [karras_sigmas(num_steps, 0.002, 80.0, dtype=F64)[:-1] for num_steps in (256, 512, 1024)]
    errors = [abs(output_std(sampler, sigmas) - exact) for sigmas in grids]
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([order] * 2, abs=0.03)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_of_a_finite_data_set_are_its_points(sampler: Sampler) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.tensor([[0.7, 0.1], [-0.5, 0.6], [-0.2, -0.8]], dtype=F64)
    x = 80 * torch.randn(300, 2, dtype=F64, generator=generator)
    samples = sampler(finite(points), x, karras_sigmas(60, 0.002, 80.0, dtype=F64))
    distance, nearest = torch.cdist(samples, points).min(1)
    assert distance.quantile(0.95) < 0.01  # the rest are drawn to two points alike until the last steps
    assert (nearest.bincount(minlength=3) > 60).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_of_one_step_return_the_denoised_noise(sampler: Sampler) -> None:
    x = 80 * torch.randn(2, 3, 4, 4, dtype=F64)
    expected = gaussian(mean=0.3)(x, torch.full((2,), 80.0, dtype=F64))
    torch.testing.assert_close(sampler(gaussian(mean=0.3), x, torch.tensor([80.0, 0.0])), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_scale_with_the_data(sampler: Sampler) -> None:
    x, sigmas, a = 80 * torch.randn(4, 3, dtype=F64), karras_sigmas(12, 0.002, 80.0, dtype=F64), 3.0
    scaled = sampler(gaussian(a * 0.5, a * 0.2), a * x, a * sigmas)
    torch.testing.assert_close(scaled, a * sampler(gaussian(0.5, 0.2), x, sigmas), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sampler", "calls"), [(sample_euler, 7), (sample_heun, 13), (sample_dpmpp_2m, 7)])
def test_denoiser_is_called_as_often_as_promised(sampler: Sampler, calls: int) -> None:
    levels: list[Tensor] = []
    sigmas = karras_sigmas(7, 0.002, 80.0)
    sampler(counted(gaussian(), levels), torch.randn(2, 3), sigmas)
    assert len(levels) == calls
    assert all(level.shape == (2,) for level in levels)
    assert {level[0].item() for level in levels} == set(sigmas[:-1].tolist())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_samplers_keep_the_dtype_and_no_graph(sampler: Sampler, dtype: torch.dtype) -> None:
    levels: list[Tensor] = []
    scale = torch.ones((), dtype=dtype, requires_grad=True)
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    before = x.clone()
    out = sampler(counted(lambda x, sigma: scale * gaussian()(x, sigma), levels), x, karras_sigmas(5, 0.1, 10.0))
    assert out.dtype == dtype == levels[0].dtype
    assert out.shape == x.shape
    assert not out.requires_grad
    assert torch.equal(x, before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_never_look_at_the_device(sampler: Sampler) -> None:
    """On the meta device there are no values to look at: what runs there makes no host wait."""
    denoise = guided(gaussian(), gaussian(mean=0.5), 3.0)
    assert sampler(denoise, torch.empty(2, 3, 4, 4, device="meta"), karras_sigmas(5, 0.1, 10.0)).device.type == "meta"


def test_churn_takes_a_generator_of_the_host_wherever_x_is() -> None:
    x, sigmas = torch.empty(2, 3, device="meta"), karras_sigmas(5, 0.1, 10.0)
    assert sample_heun(gaussian(), x, sigmas, 5.0).device.type == "meta"
    assert sample_heun(gaussian(), x, sigmas, 5.0, generator=torch.Generator()).device.type == "meta"


def test_euler_is_ddim() -> None:
    """DDIM (Song et al. 2021, Eq. 12, no noise) steps x_t = sqrt(abar) y + sqrt(1 - abar) n by the predicted eps."""
    schedule = TimestepSchedule()
    timesteps = torch.arange(999, -1, -37)
    sigmas = schedule.sigmas().double()[timesteps]

    def eps(x: Tensor, t: Tensor) -> Tensor:
        return (x + append_dims(t, x.ndim) / 1000).tanh()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return EpsPreconditioning(schedule).denoise(eps, x, sigma)

    noise = torch.randn(2, 3, 4, 4, dtype=F64)
    alpha_bar = 1 / (1 + sigmas**2)
    x = noise * (1 - alpha_bar[0]).sqrt()
    for i in range(len(timesteps) - 1):
        prediction = eps(x, timesteps[i].double().expand(2))
        clean = (x - (1 - alpha_bar[i]).sqrt() * prediction) / alpha_bar[i].sqrt()
        x = alpha_bar[i + 1].sqrt() * clean + (1 - alpha_bar[i + 1]).sqrt() * prediction
    expected = x / alpha_bar[-1].sqrt()
    torch.testing.assert_close(sample_euler(denoise, noise * sigmas[0], sigmas), expected, rtol=1e-6, atol=1e-6)


def test_dpmpp_2m_follows_its_paper() -> None:
    """Algorithm 2 of Lu et al. (2022b) with alpha = 1 and lambda = -ln(sigma)."""
    sigmas = karras_sigmas(9, 0.05, 20.0, dtype=F64)[:-1]
    denoise, x = finite(torch.randn(5, 3, dtype=F64)), 20 * torch.randn(2, 3, dtype=F64)
    lam = -sigmas.log()
    expected, models = x, []
    for i in range(1, len(sigmas)):
        models.append(denoise(expected, sigmas[i - 1].expand(2)))
        h = lam[i] - lam[i - 1]
        combined = models[-1]
        if i > 1:
            r = (lam[i - 1] - lam[i - 2]) / h
            combined = (1 + 1 / (2 * r)) * models[-1] - 1 / (2 * r) * models[-2]
        expected = sigmas[i] / sigmas[i - 1] * expected - torch.expm1(-h) * combined
    torch.testing.assert_close(sample_dpmpp_2m(denoise, x, sigmas), expected, rtol=1e-10, atol=1e-10)


def churn_variance(
    sigmas: list[float], s_churn: float, s_tmin: float = 0.0, s_tmax: float = inf, s_noise: float = 1.0
) -> float:
    """Variance of Algorithm 2's samples of N(0, 0.25): every step multiplies x by a number of its own."""
    variance, steps = sigmas[0] ** 2, len(sigmas) - 1
    for t, t_next in pairwise(sigmas):
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0.0
        t_hat = t + gamma * t
        variance += s_noise**2 * (t_hat**2 - t**2)
        slope = t_hat / (0.25 + t_hat**2)  # (x - D) / t_hat for x = 1
        factor = 1 + (t_next - t_hat) * slope
        if t_next > 0:
            factor = 1 + (t_next - t_hat) * (slope + factor * t_next / (0.25 + t_next**2)) / 2
        variance *= factor**2
    return variance


@pytest.mark.parametrize("churn", [(0.0,), (3.0,), (3.0, 0.05, 5.0, 1.1), (100.0, 0.05, 50.0, 1.003)])
def test_churn_has_the_variance_of_algorithm_2(churn: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    sigmas = karras_sigmas(12, 0.002, 80.0, dtype=F64)
    x = 80 * torch.randn(200_000, 1, dtype=F64, generator=generator)
    samples = sample_heun(gaussian(), x, sigmas, *churn, generator=generator)
    expected = churn_variance(sigmas.tolist(), *churn)
    assert samples.var().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / 200_000))


def test_churn_raises_the_noise_level_the_denoiser_sees() -> None:
    levels: list[Tensor] = []
    sigmas = karras_sigmas(6, 0.1, 10.0, dtype=F64)
    x = torch.randn(2, 3, dtype=F64)
    s_tmax, s_tmin = sigmas[1].item(), sigmas[3].item()
    sample_heun(counted(gaussian(), levels), x, sigmas, 0.6, s_tmin, s_tmax)
    raised = [s * 1.1 if i in (1, 2, 3) else s for i, s in enumerate(sigmas[:-1].tolist())]
    assert [level[0].item() for level in levels[::2]] == pytest.approx(raised, rel=1e-12)
    assert [level[0].item() for level in levels[1::2]] == pytest.approx(sigmas[1:-1].tolist(), rel=1e-12)
    levels.clear()
    sample_heun(counted(gaussian(), levels), x, sigmas, s_churn=1e9)
    assert levels[0][0].item() == pytest.approx(10 * math.sqrt(2), rel=1e-12)


def test_churn_outside_of_its_interval_is_algorithm_1() -> None:
    x, sigmas = 10 * torch.randn(2, 3), karras_sigmas(6, 0.1, 10.0)
    state = torch.get_rng_state()
    assert torch.equal(sample_heun(gaussian(), x, sigmas, 5.0, s_tmin=11.0), sample_heun(gaussian(), x, sigmas))
    assert torch.equal(sample_heun(gaussian(), x, sigmas, 5.0, s_tmax=0.05), sample_heun(gaussian(), x, sigmas))
    assert torch.equal(torch.get_rng_state(), state)


def test_churn_repeats_with_its_generator() -> None:
    x, sigmas = 10 * torch.randn(2, 3), karras_sigmas(6, 0.1, 10.0)
    a, b, c = (
        sample_heun(gaussian(), x, sigmas, 5.0, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_heun_beats_euler_at_equal_cost_and_rho_is_best_from_5_to_10() -> None:
    def error(sampler: Sampler, steps: int, rho: float = 7.0) -> float:
        return abs(output_std(sampler, karras_sigmas(steps, 0.002, 80.0, rho, F64)) - 0.5)

    for nfe in (35, 51, 79):
        assert error(sample_heun, (nfe + 1) // 2) < error(sample_euler, nfe)
    best = min(error(sample_heun, 18, rho) for rho in (5, 6, 7, 8, 9, 10))
    assert all(error(sample_heun, 18, rho) < 1.2 * best for rho in (5, 7, 10))
    assert all(error(sample_heun, 18, rho) > 3 * best for rho in (1, 2))
