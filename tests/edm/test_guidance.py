from math import inf

import pytest
import torch
from torch import Tensor

from lit_edm.edm import guided


class Counted:
    """A denoiser that returns a constant times x and counts its calls."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls += 1
        return self.factor * x


def levels(*sigma: float) -> Tensor:
    return torch.tensor(sigma)


X = torch.randn(3, 2, 4, 4)


def test_guidance_extrapolates_from_the_unconditional_denoiser() -> None:
    conditional, unconditional = Counted(0.5), Counted(0.2)
    for scale in (0.0, 0.5, 2.0, 7.5):
        out = guided(conditional, unconditional, scale)(X, levels(0.01, 1.0, 80.0))
        torch.testing.assert_close(out, (0.2 + scale * (0.5 - 0.2)) * X)


def test_scale_one_never_asks_the_unconditional_denoiser() -> None:
    conditional, unconditional = Counted(0.5), Counted(0.2)
    assert torch.equal(guided(conditional, unconditional, 1.0)(X, levels(1, 1, 1)), 0.5 * X)
    assert unconditional.calls == 0


@pytest.mark.parametrize(("sigma", "inside"), [(0.28, False), (0.281, True), (2.9, True), (2.901, False)])
def test_guidance_is_limited_to_its_interval(sigma: float, inside: bool) -> None:
    conditional, unconditional = Counted(0.5), Counted(0.2)
    out = guided(conditional, unconditional, 3.0, 0.28, 2.9)(X, levels(sigma, sigma, sigma))
    torch.testing.assert_close(out, (0.2 + 3 * 0.3 if inside else 0.5) * X)
    assert (conditional.calls, unconditional.calls) == (1, int(inside))


@pytest.mark.parametrize(("bounds", "outside"), [((0.28, inf), 0.1), ((0.0, 2.9), 3.0)])
def test_an_interval_open_to_one_side_spares_calls_on_the_other(bounds: tuple[float, float], outside: float) -> None:
    unconditional = Counted(0.2)
    for sigma, calls in ((outside, 0), (1.0, 1)):
        guided(Counted(0.5), unconditional, 3.0, *bounds)(X, levels(sigma, sigma, sigma))
        assert unconditional.calls == calls


@pytest.mark.parametrize(("bounds", "guided_examples"), [((0.5, inf), [1, 2]), ((0.0, 2.0), [0, 1]), ((0.5, 2.0), [1])])
def test_every_example_has_its_own_noise_level(bounds: tuple[float, float], guided_examples: list[int]) -> None:
    out = guided(Counted(0.5), Counted(0.2), 3.0, *bounds)(X, levels(0.1, 1.0, 10.0))
    for i in range(3):
        torch.testing.assert_close(out[i], (1.1 if i in guided_examples else 0.5) * X[i])


def test_an_unlimited_interval_looks_at_no_noise_level() -> None:
    """On the meta device there are no values to look at: what runs there makes no host wait."""
    x, sigma = X.to("meta"), levels(1, 1, 1).to("meta")
    assert guided(Counted(0.5), Counted(0.2), 3.0)(x, sigma).shape == x.shape


def test_guidance_keeps_the_dtype() -> None:
    sigma = levels(1, 1, 1).double()
    assert guided(Counted(0.5), Counted(0.2), 3.0, 0.1)(X.double(), sigma).dtype == torch.float64
    assert guided(Counted(0.5), Counted(0.2), 3.0, 0.1)(X, sigma.float()).dtype == torch.float32
