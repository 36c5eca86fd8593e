import math

import pytest
import torch
from torch import Tensor

from lit_edm.edm import (
    EDMTrajectory,
    IDDPMTrajectory,
    Trajectory,
    VETrajectory,
    VPTrajectory,
    append_dims,
    karras_sigmas,
    sample_euler,
    sample_heun,
    sample_trajectory,
)

F64 = torch.float64
VP: list[Trajectory] = [VPTrajectory(), VPTrajectory(10.0, 0.3)]
TRAJECTORIES = [*VP, VETrajectory(), IDDPMTrajectory(), EDMTrajectory()]
TIMES = torch.linspace(0.01, 1, 50, dtype=F64)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of N(0, 0.25)."""
    return x * append_dims(0.25 / (0.25 + sigma**2), x.ndim)


def curved(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of the data set {-0.5, 0.5} in each dimension."""
    return 0.5 * (0.5 * x / append_dims(sigma**2, x.ndim)).tanh()


def relative_error(trajectory: Trajectory, times: Tensor, heun: bool) -> float:
    """Of the standard deviation of samples of N(0, 0.25), whose exact flow keeps x / sqrt(0.25 + sigma^2)."""
    sigma, s = trajectory.sigma(times[0]), trajectory.s(times[0])
    exact = sigma * 0.5 / (0.25 + sigma**2).sqrt()
    return abs(sample_trajectory(gaussian, (s * sigma)[None, None], trajectory, times, heun) / exact - 1).item()


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_derivatives_are_those_of_the_schedule_and_the_scaling(trajectory: Trajectory) -> None:
    t = TIMES.clone().requires_grad_()
    for function, derivative in ((trajectory.sigma, trajectory.sigma_dot), (trajectory.s, trajectory.s_dot)):
        value = function(t)
        expected = torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(derivative(TIMES), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_time_inverts_sigma(trajectory: Trajectory) -> None:
    torch.testing.assert_close(trajectory.time(trajectory.sigma(TIMES)), TIMES, rtol=1e-12, atol=0)


def test_vp_keeps_the_variance_and_the_others_the_scale() -> None:
    vp = VPTrajectory()
    torch.testing.assert_close(vp.s(TIMES) ** 2 * (1 + vp.sigma(TIMES) ** 2), torch.ones(50, dtype=F64))
    torch.testing.assert_close(vp.s(TIMES), (-19.9 * TIMES**2 / 4 - 0.1 * TIMES / 2).exp())
    for trajectory in (VETrajectory(), IDDPMTrajectory(), EDMTrajectory()):
        assert torch.equal(trajectory.s(TIMES), torch.ones(50, dtype=F64))


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("num_steps", [1, 2, 18, 256])
def test_time_steps_decrease_to_zero(trajectory: Trajectory, num_steps: int) -> None:
    times = trajectory.time_steps(num_steps)
    assert times.shape == (num_steps + 1,)
    assert times.dtype == F64
    assert times[-1] == 0
    assert (times.diff() < 0).all()


def test_time_steps_are_those_of_table_1() -> None:
    i = torch.arange(18, dtype=F64)
    vp = 1 + i / 17 * (1e-3 - 1)
    ve = 100**2 * (0.02**2 / 100**2) ** (i / 17)
    torch.testing.assert_close(VPTrajectory().time_steps(18)[:-1], vp, rtol=1e-12, atol=0)
    torch.testing.assert_close(VETrajectory().time_steps(18)[:-1], ve, rtol=1e-12, atol=0)
    assert torch.equal(EDMTrajectory().time_steps(18), karras_sigmas(18, 0.002, 80.0, dtype=F64))


def test_iddpm_steps_are_entries_of_its_table() -> None:
    """1 + u_j^2 = abar_1000 / abar_j, at j = floor(8 + 991 i / (N - 1) + 1/2)."""

    def u(j: int) -> float:
        alpha_bar = [math.sin(math.pi / 2 * k / 1008) ** 2 for k in (1000, j)]
        return math.sqrt(alpha_bar[0] / alpha_bar[1] - 1)

    for num_steps in (10, 18, 250):
        expected = [u(math.floor(8 + 991 * i / (num_steps - 1) + 0.5)) for i in range(num_steps)]
        assert IDDPMTrajectory().time_steps(num_steps).tolist() == pytest.approx([*expected, 0.0], rel=3e-7)


@pytest.mark.parametrize("trajectory", [EDMTrajectory(), IDDPMTrajectory()])
@pytest.mark.parametrize(("heun", "sampler"), [(True, sample_heun), (False, sample_euler)])
def test_the_simple_samplers_are_the_case_of_time_being_sigma(trajectory: Trajectory, heun: bool, sampler) -> None:
    times = trajectory.time_steps(18)
    x = times[0] * torch.randn(4, 3, dtype=F64)
    general = sample_trajectory(curved, x, trajectory, times, heun)
    torch.testing.assert_close(general, sampler(curved, x, times), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_order_of_convergence(trajectory: Trajectory, heun: bool, order: int) -> None:
    """From sigma 20 to 0.1 the flow has the same end along every trajectory."""
    sigma = torch.tensor([20.0, 0.1], dtype=F64)
    t, s = trajectory.time(sigma), trajectory.s(trajectory.time(sigma))
    exact = s[1] * ((0.25 + sigma[1] ** 2) / (0.25 + sigma[0] ** 2)).sqrt() * sigma[0]
    errors = []
    for steps in (512, 1024):
        times = trajectory.time(karras_sigmas(steps, 0.1, 20.0, dtype=F64)[:-1])
        torch.testing.assert_close(times[[0, -1]], t)
        end = sample_trajectory(gaussian, (s[0] * sigma[:1])[None], trajectory, times, heun)
        errors.append((end - exact).abs().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.05)


def test_every_trajectory_of_one_noise_ends_in_the_same_sample() -> None:
    noise = torch.randn(5, 3, dtype=F64)
    ends = []
    for trajectory in TRAJECTORIES:
        times = trajectory.time(karras_sigmas(1000, 0.1, 80.0, dtype=F64)[:-1])
        x = noise * trajectory.s(times[0]) * trajectory.sigma(times[0])
        ends.append(sample_trajectory(curved, x, trajectory, times) / trajectory.s(times[-1]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-4)


def test_what_an_exact_denoiser_shows_at_35_calls() -> None:
    vp, ve, iddpm, edm = VPTrajectory(), VETrajectory(), IDDPMTrajectory(), EDMTrajectory()
    original = relative_error(ve, ve.time_steps(35), heun=False)
    with_heun_and_edm_steps = relative_error(ve, ve.time(edm.time_steps(18)), heun=True)
    ours = relative_error(edm, edm.time_steps(18), heun=True)
    assert original > with_heun_and_edm_steps > ours
    others = [relative_error(vp, vp.time_steps(35), False), relative_error(iddpm, iddpm.time_steps(35), False), ours]
    assert original > 10 * max(others)


@pytest.mark.parametrize(("heun", "calls"), [(False, 6), (True, 11)])
def test_denoiser_is_called_at_the_noise_levels_of_the_times(heun: bool, calls: int) -> None:
    levels: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (2,)
        assert sigma.dtype == x.dtype == torch.float32
        levels.append(sigma[0].item())
        return gaussian(x, sigma)

    trajectory = VPTrajectory()
    times = trajectory.time_steps(6)
    out = sample_trajectory(denoise, torch.randn(2, 3), trajectory, times, heun)
    assert out.dtype == torch.float32
    assert len(levels) == calls
    assert sorted(set(levels)) == pytest.approx(trajectory.sigma(times[:-1]).flip(0).tolist(), rel=1e-6)


def test_trajectories_never_look_at_the_device() -> None:
    x = torch.empty(2, 3, device="meta")
    assert sample_trajectory(gaussian, x, VPTrajectory(), VPTrajectory().time_steps(4)).device.type == "meta"
