import math

import numpy as np
import pytest
import torch

from lit_edm.edm import TimestepSchedule
from lit_edm.edm.schedule import iddpm_sigmas, vp_sigma, vp_time

SCHEDULES = [
    TimestepSchedule(),
    TimestepSchedule(beta_schedule="linear"),
    TimestepSchedule(zero_terminal_snr=True),
    TimestepSchedule(100, 0.001, 0.02, "linear", True),
]
CPU = torch.device("cpu")


def reference_sigmas(schedule: TimestepSchedule) -> np.ndarray:
    """sigma_t as DDPM's betas, Lin et al.'s Algorithm 1 and diffusers' last abar say, one timestep after the other."""
    steps = schedule.num_timesteps
    if schedule.beta_schedule == "linear":
        betas = np.linspace(schedule.beta_start, schedule.beta_end, steps)
    else:
        betas = np.linspace(math.sqrt(schedule.beta_start), math.sqrt(schedule.beta_end), steps) ** 2
    if schedule.zero_terminal_snr:
        root = np.sqrt(np.cumprod(1 - betas))
        shifted = root - root[-1]
        bar = (shifted * root[0] / shifted[0]) ** 2
        betas = 1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    sigmas, alpha_bar = [], 1.0
    for t, beta in enumerate(betas):
        alpha_bar *= 1 - beta
        if schedule.zero_terminal_snr and t == steps - 1:
            alpha_bar = 2.0**-24
        sigmas.append(math.sqrt((1 - alpha_bar) / alpha_bar))
    return np.array(sigmas)


def test_sdxl_spans_its_known_range() -> None:
    schedule = TimestepSchedule()
    assert schedule.sigma_min == pytest.approx(0.0291671582, rel=1e-7)
    assert schedule.sigma_max == pytest.approx(14.6146412293, rel=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_table_equals_the_reference(schedule: TimestepSchedule) -> None:
    sigmas = schedule.sigmas()
    assert sigmas.dtype == torch.float32
    assert (sigmas.diff() > 0).all()
    np.testing.assert_allclose(sigmas.numpy(), reference_sigmas(schedule), rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_table_entries_are_integer_timesteps_exactly(schedule: TimestepSchedule, dtype: torch.dtype) -> None:
    sigmas, timesteps = schedule.sigmas().to(dtype), torch.arange(schedule.num_timesteps, dtype=dtype)
    assert torch.equal(schedule.timestep(sigmas), timesteps)
    assert torch.equal(schedule.sigma(timesteps), sigmas)
    assert torch.equal(schedule.sigma(timesteps.long()), schedule.sigmas())
    for t in (0, 1, schedule.num_timesteps - 1):  # as samplers give it: one level, expanded
        assert torch.equal(schedule.timestep(sigmas[t].expand(3)), timesteps[t].expand(3))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_timesteps_are_linear_in_the_logarithm_of_sigma(schedule: TimestepSchedule) -> None:
    log_sigmas = schedule.sigmas().double().log()
    for fraction in (0.1, 0.5, 0.9):
        sigma = torch.lerp(log_sigmas[:-1], log_sigmas[1:], fraction).exp()
        timestep = torch.arange(schedule.num_timesteps - 1) + torch.tensor(fraction, dtype=torch.float64)
        torch.testing.assert_close(schedule.timestep(sigma), timestep, rtol=0, atol=1e-8)
        torch.testing.assert_close(schedule.timestep(sigma.float()), timestep.float(), rtol=0, atol=2e-4)
        torch.testing.assert_close(schedule.sigma(timestep), sigma, rtol=1e-12, atol=0)


def test_timesteps_are_clipped_to_the_table() -> None:
    schedule = TimestepSchedule()
    sigma = torch.tensor([0.0, 1e-3, 100.0, math.inf])
    assert schedule.timestep(sigma).tolist() == [0, 0, 999, 999]
    assert schedule.sigma(torch.tensor([-5.0, 2000.0])).tolist() == [schedule.sigma_min, schedule.sigma_max]


def test_the_table_is_made_once_and_serves_autograd_even_if_made_in_inference_mode() -> None:
    schedule = TimestepSchedule(num_timesteps=77)
    with torch.inference_mode():
        table = schedule.sigmas()
        u = iddpm_sigmas(77, 0.001, 0.008, CPU)
    assert schedule.sigmas() is table is TimestepSchedule(num_timesteps=77).sigmas("cpu")
    weight = torch.ones(77, requires_grad=True)
    (weight * table * u).sum().backward()
    assert weight.grad is not None


def test_vp_time_inverts_vp_sigma_and_does_not_cancel() -> None:
    t = torch.cat([torch.logspace(-8, 0, 33, dtype=torch.float64)])
    beta = 19.9, 0.1
    torch.testing.assert_close(vp_time(vp_sigma(t, *beta), *beta), t, rtol=1e-14, atol=0)
    torch.testing.assert_close(vp_time(vp_sigma(t.float(), *beta), *beta), t.float(), rtol=1e-6, atol=0)
    plain = (19.9 * t**2 / 2 + 0.1 * t).exp().sub(1).sqrt()
    torch.testing.assert_close(vp_sigma(t, *beta)[16:], plain[16:], rtol=1e-10, atol=0)


def test_iddpm_table_equals_its_closed_form() -> None:
    """Where C1 does not clip, the recursion telescopes to 1 + u_j^2 = abar_M / abar_j."""
    u = iddpm_sigmas(1000, 0.001, 0.008, CPU).double().numpy()
    alpha_bar = np.sin(np.pi / 2 * np.arange(1001) / 1008) ** 2
    np.testing.assert_allclose(u[1:], np.sqrt(alpha_bar[1000] / alpha_bar[1:1000] - 1), rtol=2e-7)
    np.testing.assert_allclose(u[0], math.sqrt((u[1] ** 2 + 1) / 0.001 - 1), rtol=1e-6)
    assert u[8] == pytest.approx(80, rel=0.01)  # why Table 1 starts at j_0 = 8
