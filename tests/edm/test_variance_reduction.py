import copy
import math

import pytest
import torch
from torch import Tensor

from lit_edm.edm import (
    AdaptiveNoise,
    EDMWeighting,
    IDDPMNoise,
    InverseTransform,
    LogNormal,
    LogUniform,
    NoiseDistribution,
    Stratified,
    UniformTimesteps,
)
from lit_edm.edm.draws import Share, drawn, sharing

CPU = torch.device("cpu")
UNIT = LogUniform(1.0, math.e)
"""A law whose CDF is ln(sigma)."""


def unit_draws(noise: NoiseDistribution, batch_size: int, generator: torch.Generator) -> Tensor:
    """Draws from a law made of UNIT and returns its quantiles."""
    return noise(batch_size, CPU, generator).double().log().clamp(0, 1 - 1e-9)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_every_stratum_is_drawn_once(batch_size: int, generator: torch.Generator) -> None:
    u = unit_draws(Stratified(UNIT), batch_size, generator)
    assert (u * batch_size).long().sort().values.tolist() == list(range(batch_size))


@pytest.mark.parametrize(("batch_size", "size"), [(1, 4), (3, 2), (8, 4), (5, 8)])
def test_processes_share_out_the_strata_of_the_whole_batch(batch_size: int, size: int) -> None:
    strata = []
    for rank in range(size):
        with sharing(Share(7, rank * batch_size, size * batch_size)):
            sigma = drawn(batch_size, lambda count: Stratified(UNIT)(count, CPU))
        strata += (sigma.double().log().clamp(0, 1 - 1e-9) * batch_size * size).long().tolist()
    assert sorted(strata) == list(range(batch_size * size))


def test_every_position_of_the_batch_follows_the_law(generator: torch.Generator) -> None:
    u = torch.stack([unit_draws(Stratified(UNIT), 4, generator) for _ in range(4000)])
    for position in range(4):
        expected = (torch.arange(4000) + 0.5) / 4000
        assert (u[:, position].sort().values - expected).abs().max() * math.sqrt(4000) < 2.2


def test_the_mean_over_a_stratified_batch_varies_less(generator: torch.Generator) -> None:
    """Var of the mean of B stratified uniforms is 1 / (12 B^3), and not 1 / (12 B)."""
    means = torch.stack([unit_draws(Stratified(UNIT), 16, generator).mean() for _ in range(4000)])
    assert means.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 16**3 / 4000))
    assert means.var().item() == pytest.approx(1 / 12 / 16**3, rel=0.1)
    assert Stratified()(4, CPU).dtype == torch.float32


def test_stratified_passes_on_what_its_law_weighs_and_learns() -> None:
    class Law(InverseTransform):
        seen: tuple[Tensor, Tensor]

        def quantile(self, u: Tensor) -> Tensor:
            return u

        def importance(self, sigma: Tensor) -> Tensor:
            return 2 * sigma

        def observe(self, sigma: Tensor, loss: Tensor) -> None:
            self.seen = sigma, loss

    sigma, loss = torch.rand(2, 5)
    stratified = Stratified(Law())
    stratified.observe(sigma, loss)
    assert torch.equal(stratified.importance(sigma), 2 * sigma)
    assert stratified.noise.seen[0] is sigma
    assert stratified.noise.seen[1] is loss


def adapted(loss_per_bin: list[float], floor: float = 0.1) -> AdaptiveNoise:
    """An adaptive law over UNIT that has seen the given loss, and no other, in each bin."""
    noise = AdaptiveNoise(UNIT, num_bins=len(loss_per_bin), decay=0.0, floor=floor)
    centers = (torch.arange(len(loss_per_bin)) + 0.5) / len(loss_per_bin)
    noise.observe(centers.exp(), torch.tensor(loss_per_bin))
    return noise


def test_adaptive_noise_begins_as_its_law(generator: torch.Generator) -> None:
    noise = AdaptiveNoise(UNIT)
    u = unit_draws(noise, 20_000, generator).sort().values
    assert (u - (torch.arange(20_000) + 0.5) / 20_000).abs().max() * math.sqrt(20_000) < 2.2
    torch.testing.assert_close(noise.importance(u.exp()), torch.ones(20_000, dtype=torch.float32))


def test_adaptive_noise_draws_bins_by_their_loss(generator: torch.Generator) -> None:
    noise = adapted([1.0, 2.0, 4.0, 9.0], floor=0.2)
    expected = 0.2 / 4 + 0.8 * torch.tensor([1.0, 2.0, 4.0, 9.0]) / 16
    torch.testing.assert_close(noise.probabilities(), expected)
    u = unit_draws(noise, 40_000, generator)
    counts = (u * 4).long().bincount(minlength=4)
    assert ((counts - 40_000 * expected) ** 2 / (40_000 * expected)).sum() < 20
    within = (u * 4).frac().sort().values  # each bin is drawn evenly
    assert (within - (torch.arange(40_000) + 0.5) / 40_000).abs().max() * math.sqrt(40_000) < 2.2


def test_adaptive_noise_is_unbiased_and_varies_less(generator: torch.Generator) -> None:
    """The expectation of e^{5 u} over u ~ U(0, 1) is (e^5 - 1) / 5."""
    noise = adapted([math.exp(5 * (k + 0.5) / 32) for k in range(32)])
    sigma = noise(100_000, CPU, generator)
    weighed = noise.importance(sigma) * sigma**5
    expected = (math.exp(5) - 1) / 5
    assert weighed.mean().item() == pytest.approx(expected, abs=4 * weighed.std().item() / math.sqrt(100_000))
    plain = UNIT(100_000, CPU, generator) ** 5
    assert weighed.var() < 0.1 * plain.var()
    assert noise.importance(sigma).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("base", [LogNormal(), UniformTimesteps()])
def test_importance_is_the_ratio_of_the_laws(base: InverseTransform, generator: torch.Generator) -> None:
    """Bin by bin: importance times the probability of a bin is 1 / K, for a law with and one without a density."""
    noise = AdaptiveNoise(base, num_bins=10)
    sigma = base(5000, CPU, generator)
    noise.observe(sigma, EDMWeighting()(sigma))
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    bins = (u * 10).long()
    assert noise.probabilities().max() > 2 * noise.probabilities().min()
    ratio = noise.importance(base.at(u, CPU)) * noise.probabilities()[bins]
    torch.testing.assert_close(ratio, torch.full((1000,), 0.1))


def test_importance_never_exceeds_what_the_floor_allows() -> None:
    noise = adapted([0.0] * 7 + [1e6], floor=0.25)
    assert noise.importance(torch.tensor([1.0, math.e])).tolist() == pytest.approx([4.0, 1 / (8 * (0.25 / 8 + 0.75))])


def test_observed_losses_are_averaged(generator: torch.Generator) -> None:
    noise = AdaptiveNoise(UNIT, num_bins=4, decay=0.999)
    for _ in range(300):
        sigma = UNIT(64, CPU, generator)
        noise.observe(sigma, sigma * torch.randn(64, generator=generator).abs())  # E[loss^2 | sigma] = sigma^2
    edges = torch.linspace(0, 1, 5, dtype=torch.float64)
    expected = (edges[1:].mul(2).exp() - edges[:-1].mul(2).exp()) / 2 * 4
    torch.testing.assert_close(noise.squared_loss.double(), expected, rtol=0.12, atol=0)


def test_decay_counts_every_loss() -> None:
    noise = AdaptiveNoise(UNIT, num_bins=2, decay=0.5)
    noise.observe(torch.tensor([1.1, 1.2, 1.3]), torch.tensor([3.0, 3.0, 3.0]))
    assert noise.squared_loss.tolist() == pytest.approx([0.5**3 * 1 + (1 - 0.5**3) * 9, 1.0])


def test_losses_out_of_training_and_overflows_are_not_learned() -> None:
    noise = AdaptiveNoise(UNIT, num_bins=2, decay=0.0)
    noise.observe(torch.tensor([1.1, 2.5, 1.1]), torch.tensor([math.nan, math.inf, 3.0]))
    assert noise.squared_loss.tolist() == [9.0, 1.0]
    noise.eval().observe(torch.tensor([1.1]), torch.tensor([5.0]))
    assert noise.squared_loss.tolist() == [9.0, 1.0]


def test_adaptive_noise_draws_for_a_device_it_does_not_live_on() -> None:
    noise = AdaptiveNoise()
    sigma = noise(3, torch.device("meta"))
    assert sigma.device.type == noise.importance(sigma).device.type == "meta"


def test_adaptive_noise_lands_in_checkpoints() -> None:
    noise, fresh = adapted([1.0, 2.0, 4.0, 9.0]), AdaptiveNoise(UNIT, num_bins=4)
    fresh.load_state_dict(copy.deepcopy(noise.state_dict()))
    assert torch.equal(fresh.probabilities(), noise.probabilities())
    assert list(noise.state_dict()) == ["squared_loss"]  # the bins are those of the law, whatever it was at the time
    assert not list(noise.parameters())


def test_bins_must_not_cut_through_the_values_of_a_discrete_law() -> None:
    for law in (UniformTimesteps(), IDDPMNoise()):
        with pytest.raises(ValueError, match="num_bins must be a divisor of the law's 1000 values, got 32"):
            AdaptiveNoise(law, num_bins=32)
        assert AdaptiveNoise(law).num_bins == 25
    assert AdaptiveNoise(LogNormal(), num_bins=32).num_bins == 32
