import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from lit_edm.data import Digits
from lit_edm.metrics import FrechetDistance


def distance(real: Tensor, other: Tensor, size: int = 1000, features: nn.Module | None = None) -> float:
    """The metric, given its images in batches of a size."""
    metric = FrechetDistance(features)
    for images, is_real in ((real, True), (other, False)):
        for batch in images.split(size):
            metric.update(batch, real=is_real)
    assert metric.compute().dtype == torch.float64
    return metric.compute().item()


def with_moments(mean: Tensor, covariance: Tensor, count: int = 50) -> Tensor:
    """Images (N, D) whose mean and covariance are exactly those given."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def test_against_scipy() -> None:
    digits = Digits().images
    a, b = digits[:300], digits[300:700] * 0.8 + 0.1
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.mean(0), np.cov(x.T)) for x in (a.flatten(1).double().numpy(), b.flatten(1).double().numpy())
    )
    ridge = 1e-9 * np.eye(64)  # scipy's root of a singular matrix is inexact: some pixels are always dark
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(
        cov_a + cov_b - 2 * sqrtm((cov_a + ridge) @ (cov_b + ridge)).real
    )
    assert distance(a, b) == pytest.approx(expected, rel=1e-5)


def test_gaussians_of_known_moments() -> None:
    """For covariances that commute it is |mu_1 - mu_2|^2 + sum (s_1 - s_2)^2 over the principal axes."""
    torch.manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    s_1, s_2 = torch.tensor([1.0, 2, 0.5, 3]).double(), torch.tensor([2.0, 1, 0.5, 0.1]).double()
    mean = torch.tensor([1.0, -1, 0, 2]).double()
    a = with_moments(mean, rotation @ torch.diag(s_1**2) @ rotation.T)
    b = with_moments(torch.zeros(4).double(), rotation @ torch.diag(s_2**2) @ rotation.T)
    assert distance(a, b) == pytest.approx(6 + ((s_1 - s_2) ** 2).sum().item(), rel=1e-10)


def test_identical_sets_are_at_no_distance() -> None:
    digits = Digits().images[:200]  # their covariance is singular
    assert abs(distance(digits, digits.flip(0))) < 1e-6


def test_is_symmetric_and_independent_of_batches() -> None:
    a, b = torch.randn(30, 3, 2, 2), torch.randn(50, 3, 2, 2) * 2
    assert distance(a, b, 7) == pytest.approx(distance(a, b, 50), rel=1e-10)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-10)


def test_true_images_are_the_floor() -> None:
    digits = Digits().images[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    held_out, floor = digits[:400], distance(digits[:400], digits[400:800])
    assert 0.1 < floor < 1, "two finite samples of one distribution are not at distance 0"
    worse = [distance(held_out, digits[400:800] + eps * torch.randn(400, 1, 8, 8)) for eps in (0.1, 0.3, 1.0)]
    assert floor < worse[0] < worse[1] < worse[2]


def test_features_take_the_place_of_pixels() -> None:
    a, b = torch.randn(30, 1, 4, 4), torch.randn(30, 1, 4, 4) + 1
    pool = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
    assert distance(a, b, features=pool) == pytest.approx(distance(pool(a), pool(b)), rel=1e-10)
    assert distance(a, b, features=pool) < distance(a, b)


def test_features_do_not_depend_on_training_mode() -> None:
    a, b = torch.randn(30, 8), torch.randn(30, 8)
    assert distance(a, b, features=nn.Dropout(0.5).train()) == pytest.approx(distance(a, b), rel=1e-10)


def test_reset_and_too_few_images() -> None:
    metric = FrechetDistance()
    metric.update(torch.randn(5, 2), real=True)
    metric.update(torch.randn(1, 2), real=False)
    with pytest.raises(ValueError, match=r"two images or more of each set, got \[5\.0, 1\.0\]"):
        metric.compute()
    metric.reset()
    for real in (True, False):
        metric.update(torch.ones(3, 2), real=real)
    assert metric.compute() == 0
