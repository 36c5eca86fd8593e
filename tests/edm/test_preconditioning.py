import math

import pytest
import torch
from torch import Tensor

from lit_edm.edm import (
    EDMPreconditioning,
    EpsPreconditioning,
    IDDPMPreconditioning,
    Preconditioning,
    TimestepSchedule,
    VelocityPreconditioning,
    VEPreconditioning,
    VPPreconditioning,
    append_dims,
)
from lit_edm.edm.schedule import iddpm_sigmas, vp_sigma

SIGMA = torch.logspace(-3, 3, 25, dtype=torch.float64)
ONE = torch.ones_like(SIGMA)
EDM = [EDMPreconditioning(sigma_data) for sigma_data in (0.5, 0.7, 1.0, 3.0)]
DISCRETE = [EpsPreconditioning(), VelocityPreconditioning(), VPPreconditioning(), IDDPMPreconditioning()]
ALL: list[Preconditioning] = [*EDM, *DISCRETE, VEPreconditioning()]


def assert_equal(a: Tensor, b: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=0)


def target_variance(part: Preconditioning, c_skip: Tensor) -> Tensor:
    """Var of (y - c_skip x) = (1 - c_skip) y - c_skip n."""
    return (1 - c_skip) ** 2 * part.sigma_data**2 + c_skip**2 * SIGMA**2


@pytest.mark.parametrize("part", ALL)
def test_target_of_the_network_has_unit_variance(part: Preconditioning) -> None:
    scalings = part(SIGMA)
    assert_equal(target_variance(part, scalings.c_skip) / scalings.c_out**2, ONE)


@pytest.mark.parametrize("part", [*EDM, *DISCRETE])
def test_input_of_the_network_has_unit_variance(part: Preconditioning) -> None:
    assert_equal(part(SIGMA).c_in ** 2 * (part.sigma_data**2 + SIGMA**2), ONE)


@pytest.mark.parametrize("part", [*EDM, VelocityPreconditioning()])
def test_c_skip_amplifies_the_errors_of_the_network_least(part: Preconditioning) -> None:
    """Appendix B.6: c_skip minimises c_out^2, where target and input are uncorrelated."""
    c_skip = part(SIGMA).c_skip
    for change in (0.99, 1.01):
        assert (target_variance(part, c_skip * change) > target_variance(part, c_skip)).all()
    covariance = (1 - c_skip) * part.sigma_data**2 - c_skip * SIGMA**2
    torch.testing.assert_close(covariance, 0 * ONE, rtol=0, atol=1e-9)


@pytest.mark.parametrize("part", EDM)
def test_edm_scales_with_the_data(part: EDMPreconditioning) -> None:
    a = 3.0
    scaled, plain = EDMPreconditioning(a * part.sigma_data)(a * SIGMA), part(SIGMA)
    assert_equal(scaled.c_skip, plain.c_skip)
    assert_equal(scaled.c_out, a * plain.c_out)
    assert_equal(scaled.c_in, plain.c_in / a)
    torch.testing.assert_close(scaled.c_noise, plain.c_noise + math.log(a) / 4, rtol=0, atol=1e-12)


def test_edm_of_unit_data_is_velocity_prediction_of_the_other_sign() -> None:
    edm, velocity = EDMPreconditioning(1.0)(SIGMA), VelocityPreconditioning()(SIGMA)
    assert_equal(edm.c_skip, velocity.c_skip)
    assert_equal(edm.c_out, -velocity.c_out)
    assert_equal(edm.c_in, velocity.c_in)


def test_networks_predict_what_they_are_named_after() -> None:
    """With alpha^2 + s^2 = 1, x / sqrt(sigma^2 + 1) = alpha y + s n: eps is n, v is alpha n - s y."""
    y, n = torch.randn(2, len(SIGMA), dtype=torch.float64)
    alpha, s = (SIGMA**2 + 1).rsqrt(), SIGMA * (SIGMA**2 + 1).rsqrt()
    for part, prediction in ((EpsPreconditioning(), n), (VelocityPreconditioning(), alpha * n - s * y)):
        scalings = part(SIGMA)
        target = (y - scalings.c_skip * (y + SIGMA * n)) / scalings.c_out
        torch.testing.assert_close(target, prediction, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scalings.c_in * (y + SIGMA * n), alpha * y + s * n, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", [EpsPreconditioning, VelocityPreconditioning])
def test_sdxl_is_told_its_timestep(part: type[EpsPreconditioning | VelocityPreconditioning]) -> None:
    schedule = TimestepSchedule(beta_schedule="linear")
    assert torch.equal(part(schedule)(schedule.sigmas()).c_noise, torch.arange(1000.0))


def test_noise_conditions_are_those_of_table_1() -> None:
    assert_equal(EDMPreconditioning()(SIGMA).c_noise, SIGMA.log() / 4)
    assert_equal(VEPreconditioning()(SIGMA).c_noise, (SIGMA / 2).log())
    t = torch.linspace(1e-5, 1, 33, dtype=torch.float64)
    assert_equal(VPPreconditioning()(vp_sigma(t, 19.9, 0.1)).c_noise, 999 * t)
    u = iddpm_sigmas(1000, 0.001, 0.008, torch.device("cpu"))
    assert torch.equal(IDDPMPreconditioning()(u).c_noise, torch.arange(999.0, -1, -1))
    between = (0.4 * u[1:] + 0.6 * u[:-1], 0.6 * u[1:] + 0.4 * u[:-1])
    assert torch.equal(IDDPMPreconditioning()(between[0]).c_noise, torch.arange(999.0, 0, -1))
    assert torch.equal(IDDPMPreconditioning()(between[1]).c_noise, torch.arange(998.0, -1, -1))


def test_the_remaining_columns_scale_as_in_table_1() -> None:
    c_skip, c_out, c_in, _ = VEPreconditioning()(SIGMA)
    assert torch.equal(c_skip, ONE)
    assert torch.equal(c_out, SIGMA)
    assert torch.equal(c_in, ONE)
    for part in (EpsPreconditioning(), VPPreconditioning(), IDDPMPreconditioning()):
        assert torch.equal(part(SIGMA).c_skip, ONE)
        assert torch.equal(part(SIGMA).c_out, -SIGMA)


@pytest.mark.parametrize("part", ALL)
def test_scalings_are_finite_without_noise(part: Preconditioning) -> None:
    sigma = torch.tensor([0.0, 1e-30])
    scalings = part(sigma)
    assert all(c.shape == (2,) and c.dtype == torch.float32 and c.isfinite().all() for c in scalings)
    x = torch.randn(2, 3)
    assert torch.equal(part.denoise(lambda x, c_noise: torch.ones_like(x), x, sigma)[0], x[0])
    assert scalings.c_noise[0] <= part(torch.ones(2)).c_noise[0]


@pytest.mark.parametrize("part", ALL)
def test_scalings_in_float32_are_those_in_float64(part: Preconditioning) -> None:
    for single, double in zip(part(SIGMA.float())[:3], part(SIGMA.float().double())[:3], strict=True):
        assert_equal(single.double(), double, rtol=5e-7)


@pytest.mark.parametrize("part", ALL)
def test_denoise_is_equation_7(part: Preconditioning) -> None:
    x, sigma = torch.randn(25, 3, 4, 4, dtype=torch.float64), SIGMA
    c_skip, c_out, c_in, c_noise = part(sigma)

    def network(scaled: Tensor, noise_condition: Tensor) -> Tensor:
        assert_equal(scaled, append_dims(c_in, 4) * x)
        assert torch.equal(noise_condition, c_noise)
        return scaled.tanh()

    expected = torch.stack([c_skip[i] * x[i] + c_out[i] * (c_in[i] * x[i]).tanh() for i in range(len(x))])
    assert_equal(part.denoise(network, x, sigma), expected)


def test_denoise_keeps_its_precision_around_a_network_of_less() -> None:
    x, sigma = torch.randn(4, 3, 8, 8), torch.full((4,), 0.002)
    denoised = EDMPreconditioning().denoise(lambda x, c_noise: x.bfloat16(), x, sigma)
    assert denoised.dtype == torch.float32
    c_skip, c_out, c_in, _ = (c.double()[0] for c in EDMPreconditioning()(sigma))
    output = (c_in.float() * x).bfloat16().double()
    torch.testing.assert_close(denoised.double(), c_skip * x.double() + c_out * output, rtol=2e-7, atol=1e-9)
