import math

import pytest
import torch
from torch import Tensor

from lit_edm.edm import (
    EDMPreconditioning,
    EDMWeighting,
    LearnedWeighting,
    LossWeighting,
    MinSNRWeighting,
    SNRWeighting,
    SoftMinSNRWeighting,
    TruncatedSNRWeighting,
    UnitWeighting,
)

SIGMA = torch.logspace(-3, 3, 25, dtype=torch.float64)


def rows(sigma_data: float) -> list[tuple[LossWeighting, Tensor]]:
    """Each weighting, and what it makes of the squared error of EDM's network F."""
    r = sigma_data**2 / SIGMA**2
    return [
        (EDMWeighting(sigma_data), torch.ones_like(r)),
        (SNRWeighting(), r / (r + 1)),
        (MinSNRWeighting(5.0, sigma_data), r.minimum(torch.full_like(r, 5.0)) / (r + 1)),
        (MinSNRWeighting(1.0, sigma_data), r.minimum(torch.full_like(r, 1.0)) / (r + 1)),
        (SoftMinSNRWeighting(sigma_data), r / (r + 1) ** 2),
        (TruncatedSNRWeighting(sigma_data), r.maximum(torch.ones_like(r)) / (r + 1)),
        (UnitWeighting(), sigma_data**2 / (r + 1)),
    ]


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("row", range(7))
def test_weight_of_the_error_of_the_network(row: int, sigma_data: float) -> None:
    weighting, expected = rows(sigma_data)[row]
    c_out = EDMPreconditioning(sigma_data)(SIGMA).c_out
    torch.testing.assert_close(weighting(SIGMA) * c_out**2, expected, rtol=1e-12, atol=0)
    error = torch.rand_like(SIGMA)
    assert torch.equal(weighting.weigh(error, SIGMA), weighting(SIGMA) * error)
    torch.testing.assert_close(weighting(SIGMA.float()).double(), weighting(SIGMA.float().double()), rtol=5e-7, atol=0)


def test_soft_min_snr_is_half_the_harmonic_mean_of_snr_and_unit_snr() -> None:
    expected = 1 / (1 / SNRWeighting()(SIGMA) + 1 / (UnitWeighting()(SIGMA) / 0.7**2))
    torch.testing.assert_close(SoftMinSNRWeighting(0.7)(SIGMA), expected, rtol=1e-12, atol=0)


def test_learned_weighting_begins_as_its_weighting() -> None:
    error, sigma = torch.rand(25), SIGMA.float()
    for weighting in (EDMWeighting(), SNRWeighting()):
        learned = LearnedWeighting(weighting)
        assert torch.equal(learned(sigma), weighting(sigma))
        assert torch.equal(learned.weigh(error, sigma), weighting(sigma) * error)


def test_learned_weighting_divides_by_e_to_the_u_and_adds_u() -> None:
    learned = LearnedWeighting(EDMWeighting())
    torch.nn.init.normal_(learned.weight, std=0.1)
    error, sigma = torch.rand(25), SIGMA.float()
    u = learned.log_loss(sigma)
    assert u.std() > 0.1
    torch.testing.assert_close(learned.weigh(error, sigma), EDMWeighting()(sigma) / u.exp() * error + u)
    torch.testing.assert_close(learned(sigma), EDMWeighting()(sigma) / u.exp())


def test_learned_weighting_learns_the_expected_loss() -> None:
    """Where |D - y|^2 = f(sigma) z / lambda, with z of mean 1, gradient descent takes e^u to f."""
    learned = LearnedWeighting(EDMWeighting())
    steps = 1000
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def expected_loss(sigma: Tensor) -> Tensor:
        return 0.05 + 0.9 / (1 + sigma**2)

    for _ in range(steps):
        sigma = (-1.2 + 1.2 * torch.randn(256)).exp()
        error = expected_loss(sigma) * (0.5 + torch.rand(256)) / EDMWeighting()(sigma)
        optimizer.zero_grad()
        learned.weigh(error, sigma).mean().backward()
        optimizer.step()
        schedule.step()
    sigma = torch.tensor([0.03, 0.1, 0.3, 1.0, 3.0])
    torch.testing.assert_close(learned.log_loss(sigma).exp(), expected_loss(sigma), rtol=0.1, atol=0)


def test_the_expected_loss_is_where_the_gradient_vanishes() -> None:
    """d/du (L / e^u + u) = 0 at e^u = L, a minimum."""
    learned = LearnedWeighting(UnitWeighting(), num_features=16)
    with torch.no_grad():
        learned.weight.normal_()
    sigma = SIGMA.float()
    loss = learned.log_loss(sigma).exp().detach()
    learned.weigh(loss, sigma).sum().backward()
    assert learned.weight.grad is not None
    torch.testing.assert_close(learned.weight.grad, torch.zeros(16), rtol=0, atol=1e-4)


def test_learned_weighting_stays_in_float32_under_autocast() -> None:
    learned = LearnedWeighting()
    torch.nn.init.normal_(learned.weight)
    sigma = SIGMA.float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = learned.log_loss(sigma)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, learned.log_loss(sigma))


def test_features_are_those_of_a_gaussian_kernel() -> None:
    """The mean product of two features is exp(-(2 pi)^2 (c - c')^2 / 2) at c = ln(sigma) / 4, as in EDM2."""
    learned = LearnedWeighting(num_features=20_000)
    sigma = torch.tensor([0.5, 0.7, 1.0, 2.0, 10.0])
    features = torch.stack([torch.autograd.grad(learned.log_loss(s), learned.weight)[0] for s in sigma.split(1)])
    distance = (sigma.log()[:, None] - sigma.log()) / 4
    expected = (-((2 * math.pi * distance) ** 2) / 2).exp()
    torch.testing.assert_close(features @ features.T / 20_000, expected, rtol=0, atol=0.04)


def test_features_are_random_and_kept_in_checkpoints() -> None:
    learned, other = LearnedWeighting(), LearnedWeighting()
    torch.nn.init.ones_(learned.weight)
    assert not torch.allclose(other.frequencies, learned.frequencies)
    other.load_state_dict(learned.state_dict())
    assert torch.equal(other.log_loss(SIGMA.float()), learned.log_loss(SIGMA.float()))
    assert [name for name, _ in learned.named_parameters()] == ["weight"]
