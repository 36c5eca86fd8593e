import math
from collections.abc import Callable
from math import inf
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_edm.edm import (
    IDDPMNoise,
    InverseTransform,
    LogNormal,
    LogUniform,
    MatchedLogNormal,
    ScaledLogNormal,
    TimestepSchedule,
    UniformKarras,
    UniformTimesteps,
    VPNoise,
)
from lit_edm.edm.schedule import iddpm_sigmas

CPU = torch.device("cpu")
U = torch.linspace(0.0005, 0.9995, 400, dtype=torch.float64)
SDXL = TimestepSchedule()
COARSE = TimestepSchedule(37, zero_terminal_snr=True)
CDF = Callable[[float], float]


def log_normal_cdf(p_mean: float, p_std: float, low: float = 0.0, high: float = inf) -> CDF:
    """The CDF of ln(sigma) ~ N(p_mean, p_std^2), given low <= sigma <= high, from the standard library."""

    def cdf(sigma: float) -> float:
        return 0.0 if sigma == 0 else 1.0 if sigma == inf else NormalDist(p_mean, p_std).cdf(math.log(sigma))

    return lambda sigma: (cdf(sigma) - cdf(low)) / (cdf(high) - cdf(low))


def karras_cdf(sigma: float) -> float:
    return (sigma ** (1 / 7) - 0.002 ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))


def vp_cdf(sigma: float) -> float:
    time = (math.sqrt(0.1**2 + 2 * 19.9 * math.log(1 + sigma**2)) - 0.1) / 19.9
    return (time - 1e-5) / (1 - 1e-5)


CONTINUOUS: list[tuple[InverseTransform, CDF]] = [
    (LogNormal(), log_normal_cdf(-1.2, 1.2)),
    (LogNormal(0.4, 0.7, sigma_min=0.5), log_normal_cdf(0.4, 0.7, 0.5)),
    (LogNormal(0.4, 0.7, sigma_max=1.5), log_normal_cdf(0.4, 0.7, 0.0, 1.5)),
    (LogNormal(-1.2, 1.2, 0.002, 80), log_normal_cdf(-1.2, 1.2, 0.002, 80)),
    (LogNormal(0.0, 1.0, 3.0, 5.0), log_normal_cdf(0.0, 1.0, 3.0, 5.0)),
    (LogNormal(0.0, 1.0, 0.1, 0.2), log_normal_cdf(0.0, 1.0, 0.1, 0.2)),
    (ScaledLogNormal(1.0), log_normal_cdf(-1.2 + math.log(2), 1.2)),
    (ScaledLogNormal(0.7, 0.1, 9.0), log_normal_cdf(-1.2 + math.log(1.4), 1.2, 0.1, 9.0)),
    (LogUniform(), lambda sigma: math.log(sigma / 0.02) / math.log(100 / 0.02)),
    (UniformKarras(), karras_cdf),
    (VPNoise(), vp_cdf),
]
DISCRETE: list[tuple[InverseTransform, Tensor]] = [
    (UniformTimesteps(), SDXL.sigmas()),
    (UniformTimesteps(COARSE), COARSE.sigmas()),
    (IDDPMNoise(), iddpm_sigmas(1000, 0.001, 0.008, CPU).flip(0)),
]
LAWS = [law for law, _ in CONTINUOUS] + [law for law, _ in DISCRETE] + [MatchedLogNormal()]


def draw(law: InverseTransform, count: int, seed: int = 0) -> Tensor:
    return law(count, CPU, torch.Generator().manual_seed(seed))


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """The two-sample statistic in units of its standard deviation: above 2.2 once in 8000 samples of one law."""
    at = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(sample), at, side="right") / len(sample) for sample in (a, b)]
    return np.abs(below[0] - below[1]).max() * math.sqrt(len(a) * len(b) / (len(a) + len(b)))


@pytest.mark.parametrize("law", LAWS)
def test_draws_are_float32_on_the_device_and_repeat_with_the_seed(law: InverseTransform) -> None:
    sigma = draw(law, 1000)
    assert sigma.shape == (1000,)
    assert sigma.dtype == torch.float32
    assert (sigma > 0).all()
    assert sigma.isfinite().all()
    assert torch.equal(sigma, draw(law, 1000))
    assert not torch.equal(sigma, draw(law, 1000, seed=1))
    torch.manual_seed(0)
    assert torch.equal(sigma, law(1000, CPU))
    assert law(3, torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize(("law", "cdf"), CONTINUOUS)
def test_quantile_inverts_the_cdf(law: InverseTransform, cdf: CDF) -> None:
    at = torch.tensor([cdf(sigma) for sigma in law.quantile(U).tolist()], dtype=torch.float64)
    torch.testing.assert_close(at, U, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("law", "cdf"), CONTINUOUS)
def test_draws_follow_the_cdf(law: InverseTransform, cdf: CDF) -> None:
    u = np.sort([cdf(sigma) for sigma in draw(law, 5000).tolist()])
    assert np.abs(u - (np.arange(5000) + 0.5) / 5000).max() * math.sqrt(5000) < 2.2


@pytest.mark.parametrize(("law", "table"), DISCRETE)
def test_discrete_laws_draw_every_entry_of_their_table_alike(law: InverseTransform, table: Tensor) -> None:
    share = (torch.arange(len(table), dtype=torch.float64) + 0.5) / len(table)
    assert torch.equal(law.quantile(share), table)
    assert torch.equal(law.quantile(share - 0.49 / len(table)), table)
    assert torch.equal(law.quantile(share + 0.49 / len(table)), table)
    entries, counts = draw(law, 50 * len(table)).unique(return_counts=True)
    assert torch.equal(entries, table)
    chi_square = ((counts - 50) ** 2 / 50).sum().item()
    assert abs(chi_square - len(table)) < 4 * math.sqrt(2 * len(table))


def test_uniform_timesteps_are_integers_to_the_network() -> None:
    timestep = SDXL.timestep(draw(UniformTimesteps(), 1000))
    assert torch.equal(timestep, timestep.round())


@pytest.mark.parametrize("bounds", [(0.3, 2.0), (0.0, 0.5), (1.0, inf)])
def test_truncation_is_the_law_of_drawing_again(bounds: tuple[float, float]) -> None:
    low, high = bounds
    sigma = draw(LogNormal(0.4, 1.1, low, high), 20_000).double().numpy()
    again = np.exp(np.random.default_rng(0).normal(0.4, 1.1, 200_000))
    again = again[(again >= low) & (again <= high)]
    assert kolmogorov_smirnov(sigma, again) < 2.2
    assert low <= sigma.min()
    assert sigma.max() <= high
    assert len(np.unique(sigma)) > 19_900  # a clamped law piles up at its bounds
    clamped = np.exp(np.random.default_rng(0).normal(0.4, 1.1, 20_000)).clip(low, high)
    assert kolmogorov_smirnov(clamped, again) > 10  # and the test would see it


def test_log_normal_is_exact_in_both_tails() -> None:
    u = torch.logspace(-15, -1, 15, dtype=torch.float64)
    expected = [math.exp(-1.2 + 1.2 * NormalDist().inv_cdf(p)) for p in u.tolist()]
    torch.testing.assert_close(LogNormal().quantile(u), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("z", [4.0, 9.0, 20.0, 35.0])
def test_log_normal_is_exact_when_all_of_it_is_a_tail(z: float) -> None:
    """Given Z > z, where Phi(-z) = erfc(z / sqrt(2)) / 2, Z exceeds its u-quantile with probability (1 - u) Phi(-z)."""
    upper, lower = LogNormal(0.0, 1.0, sigma_min=math.exp(z)), LogNormal(0.0, 1.0, sigma_max=math.exp(-z))
    for u, sigma in zip(U.tolist(), upper.quantile(U).tolist(), strict=True):
        tail = math.erfc(math.log(sigma) / math.sqrt(2)) / math.erfc(z / math.sqrt(2))
        assert tail == pytest.approx(1 - u, rel=1e-9)
    torch.testing.assert_close(lower.quantile(1 - U), 1 / upper.quantile(U), rtol=1e-11, atol=0)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("u", [0.0, 1.0])
def test_the_ends_of_the_unit_interval_are_harmless(law: InverseTransform, u: float) -> None:
    sigma = law.at(torch.full((2,), u, dtype=torch.float64), CPU)
    assert (sigma > 0).all()
    assert sigma.isfinite().all()


def test_presets_have_the_moments_they_promise() -> None:
    log_sigma = draw(UniformTimesteps(), 100_000).log()
    matched = MatchedLogNormal().law
    assert matched.p_mean == pytest.approx(0.483, abs=5e-4)
    assert matched.p_std == pytest.approx(1.194, abs=5e-4)
    assert log_sigma.mean().item() == pytest.approx(matched.p_mean, abs=0.015)
    assert log_sigma.std().item() == pytest.approx(matched.p_std, abs=0.01)
    assert (matched.sigma_min, matched.sigma_max) == (SDXL.sigma_min, SDXL.sigma_max)
    assert torch.equal(draw(MatchedLogNormal(), 100), draw(matched, 100))
    assert MatchedLogNormal(TimestepSchedule(beta_schedule="linear")).law != matched


def test_scaled_log_normal_scales_with_the_data() -> None:
    torch.testing.assert_close(draw(ScaledLogNormal(1.5), 1000), 3 * draw(LogNormal(), 1000), rtol=3e-7, atol=0)
    assert ScaledLogNormal(0.5).law == LogNormal()


def test_fixed_laws_have_no_importance_and_learn_nothing() -> None:
    sigma = draw(LogNormal(), 5)
    assert torch.equal(LogNormal().importance(sigma), torch.ones(5))
    assert LogNormal().observe(sigma, sigma) is None
