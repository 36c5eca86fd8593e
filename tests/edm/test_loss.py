import math
from dataclasses import dataclass, field
from statistics import NormalDist

import pytest
import torch
from torch import Tensor, nn

from lit_edm.edm import (
    AdaptiveNoise,
    Denoise,
    DiffusionLoss,
    EDMLoss,
    EDMPreconditioning,
    EDMWeighting,
    EpsPreconditioning,
    IDDPMPreconditioning,
    LearnedWeighting,
    LogNormal,
    LossWeighting,
    MatchedLogNormal,
    MinSNRWeighting,
    NoiseDistribution,
    Preconditioning,
    ScaledLogNormal,
    SNRWeighting,
    Stratified,
    TimestepSchedule,
    UniformTimesteps,
    UnitWeighting,
    VelocityPreconditioning,
    VEPreconditioning,
    VPPreconditioning,
    append_dims,
)


@dataclass(frozen=True)
class Fixed(NoiseDistribution):
    """One noise level, an importance, and a memory of what was observed."""

    sigma: float
    weight: float = 1.0
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        return torch.full((batch_size,), self.sigma, device=device)

    def importance(self, sigma: Tensor) -> Tensor:
        return torch.full_like(sigma, self.weight)

    def observe(self, sigma: Tensor, loss: Tensor) -> None:
        self.seen.append((sigma, loss))


def shrink(x: Tensor, sigma: Tensor) -> Tensor:
    """Some denoiser."""
    return x / (1 + append_dims(sigma, x.ndim))


def network(x: Tensor, c_noise: Tensor) -> Tensor:
    """Some network, which depends on its noise condition."""
    return (x + append_dims(c_noise, x.ndim) / 1000).tanh() * 0.8


def wrap(preconditioning: Preconditioning) -> Denoise:
    return lambda x, sigma: preconditioning.denoise(network, x, sigma)


def seeded(loss: EDMLoss, denoise: Denoise, clean: Tensor) -> Tensor:
    torch.manual_seed(0)
    return loss(denoise, clean)


def test_a_perfect_denoiser_has_no_loss() -> None:
    clean = torch.randn(4, 4, 8, 8)
    assert torch.equal(EDMLoss()(lambda x, sigma: clean, clean), torch.zeros(4))


def test_equals_a_plain_transcription_of_the_paper() -> None:
    clean = torch.randn(3, 4, 8, 8)
    torch.manual_seed(0)
    u = torch.rand(3, dtype=torch.float64).tolist()
    n = torch.randn_like(clean)
    for i, loss in enumerate(seeded(EDMLoss(), shrink, clean)):
        sigma = math.exp(-1.2 + 1.2 * NormalDist().inv_cdf(u[i]))
        denoised = (clean[i] + sigma * n[i]) / (1 + sigma)
        expected = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * (denoised - clean[i]).square().mean()
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("weighting", [SNRWeighting(), MinSNRWeighting(5.0), MinSNRWeighting(1.0)])
def test_eps_path_is_sdxls_own_loss(weighting: LossWeighting) -> None:
    """|eps - F(x_t, t)|^2 at x_t = sqrt(abar) y + sqrt(1 - abar) n, t ~ U{0..999}; min-SNR times min(r, gamma) / r."""
    clean = torch.randn(64, 4, 8, 8)
    ours = seeded(EDMLoss(UniformTimesteps(), weighting), wrap(EpsPreconditioning()), clean)
    torch.manual_seed(0)
    t = (torch.rand(64, dtype=torch.float64) * 1000).long()
    n = torch.randn_like(clean)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = append_dims((1 - betas).cumprod(0)[t], 4)
    noisy = (alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * n).float()
    reference = (network(noisy, t.float()) - n).square().mean((1, 2, 3))
    if isinstance(weighting, MinSNRWeighting):
        snr = (alpha_bar / (1 - alpha_bar)).flatten().float()
        reference *= snr.clamp(max=weighting.gamma) / snr
        assert (snr > weighting.gamma).any()
        assert (snr < weighting.gamma).any()
    torch.testing.assert_close(ours, reference, rtol=2e-5, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_velocity_path_with_min_snr_weighs_as_it_should(gamma: float) -> None:
    """|v - F(x_t, t)|^2 times min(r, gamma) / (r + 1), v = sqrt(abar) n - sqrt(1 - abar) y."""
    clean, schedule = torch.randn(16, 4, 8, 8), TimestepSchedule()
    loss = EDMLoss(UniformTimesteps(schedule), MinSNRWeighting(gamma))
    ours = seeded(loss, wrap(VelocityPreconditioning(schedule)), clean)
    torch.manual_seed(0)
    t = (torch.rand(16, dtype=torch.float64) * 1000).long()
    n = torch.randn_like(clean)
    snr = 1 / schedule.sigmas()[t].double() ** 2
    alpha, s = (append_dims(c.sqrt(), 4).float() for c in (snr / (snr + 1), 1 / (snr + 1)))
    mse = (network(alpha * clean + s * n, t.float()) - (alpha * n - s * clean)).square().mean((1, 2, 3))
    torch.testing.assert_close(ours, (snr.clamp(max=gamma) / (snr + 1)).float() * mse, rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("preconditioning", "weighting"),
    [
        (EDMPreconditioning(0.5), EDMWeighting(0.5)),
        (EDMPreconditioning(2.0), EDMWeighting(2.0)),
        (VPPreconditioning(), SNRWeighting()),
        (VEPreconditioning(), SNRWeighting()),
    ],
)
def test_loss_of_an_untrained_network_is_one_at_every_noise_level(
    preconditioning: Preconditioning, weighting: LossWeighting
) -> None:
    sigma = torch.logspace(-3, 2, 11, dtype=torch.float64)
    c_skip = preconditioning(sigma).c_skip
    expected = weighting(sigma) * ((1 - c_skip) ** 2 * preconditioning.sigma_data**2 + c_skip**2 * sigma**2)
    torch.testing.assert_close(expected, torch.ones_like(sigma), rtol=1e-12, atol=0)
    clean = preconditioning.sigma_data * torch.randn(1, 4, 128, 128)
    for level in (0.002, 0.5, 80.0):

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return preconditioning.denoise(lambda x, c_noise: 0 * x, x, sigma)

        assert seeded(EDMLoss(Fixed(level), weighting), denoise, clean).item() == pytest.approx(1, abs=0.03)


def test_loss_scales_with_the_data() -> None:
    """Data, sigma and sigma_data twice as large: the same problem to the last bit but that of p(sigma)."""
    clean = torch.randn(4, 3, 8, 8)
    losses = [
        seeded(
            EDMLoss(ScaledLogNormal(a * 0.5), EDMWeighting(a * 0.5)),
            lambda x, sigma, a=a: EDMPreconditioning(a * 0.5).denoise(lambda x, c_noise: x.sin(), x, sigma),
            a * clean,
        )
        for a in (1.0, 2.0)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-6, atol=0)


@pytest.mark.parametrize("preconditioning", [EDMPreconditioning(), EpsPreconditioning(), VelocityPreconditioning()])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_at_little_noise_is_exact_around_a_bfloat16_network(
    preconditioning: Preconditioning, autocast: bool
) -> None:
    """The loss of D is that of F, of eps and of v, each computed in float64 from the same output of the network."""
    clean, sigma = 0.5 * torch.randn(4, 4, 128, 128), 0.002  # the latents of SDXL at 1024 px
    convolution = nn.Conv2d(4, 4, 3, padding=1).bfloat16().requires_grad_(False)
    outputs = []

    def half_network(x: Tensor, c_noise: Tensor) -> Tensor:
        outputs.append(convolution(x.bfloat16()))
        return outputs[-1]

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = seeded(EDMLoss(Fixed(sigma)), lambda x, s: preconditioning.denoise(half_network, x, s), clean)
    assert loss.dtype == torch.float32

    torch.manual_seed(0)
    y, n = clean.double(), torch.randn_like(clean).double()
    level = torch.full((1,), sigma).double()
    s, weight = level.item(), EDMWeighting()(level).item()
    c_skip, c_out = (c.item() for c in preconditioning(level)[:2])
    denoised = c_skip * (y + s * n) + c_out * outputs[0].double()
    eps, alpha = (y + s * n - denoised) / s, 1 / math.sqrt(1 + s * s)
    velocity, true_velocity = alpha * eps - s * alpha * denoised, alpha * n - s * alpha * y
    values = {
        "D": weight * (denoised - y).square(),
        "eps": weight * s**2 * (eps - n).square(),
        "v": weight * (s * alpha) ** 2 * (velocity - true_velocity).square(),
        "F": weight * c_out**2 * (outputs[0].double() - (y - c_skip * (y + s * n)) / c_out).square(),
    }
    for value in values.values():
        torch.testing.assert_close(value.mean(), values["D"].mean(), rtol=1e-10, atol=0)
    # c_skip y rounds to 6e-8 of a latent, where the error is 2e-3 of one; over a batch that averages out
    torch.testing.assert_close(loss.double(), values["F"].mean((1, 2, 3)), rtol=3e-6, atol=0)
    torch.testing.assert_close(loss.double().mean(), values["F"].mean(), rtol=1e-6, atol=0)


def test_half_precision_latents_are_scored_in_float32() -> None:
    clean = torch.randn(2, 4, 8, 8).bfloat16()
    dtypes = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        dtypes.append((x.dtype, sigma.dtype))
        return shrink(x, sigma)

    assert torch.equal(seeded(EDMLoss(), denoise, clean), seeded(EDMLoss(), denoise, clean.float()))
    assert set(dtypes) == {(torch.float32, torch.float32)}
    assert EDMLoss()(shrink, clean.double()).dtype == torch.float64


def test_loss_is_a_mean_over_each_example() -> None:
    clean = torch.randn(5, 2, 4, 4)
    errors = append_dims(torch.arange(5.0), 4)
    loss = EDMLoss(Fixed(1.0), UnitWeighting())(lambda x, sigma: clean + errors, clean)
    torch.testing.assert_close(loss, torch.arange(5.0) ** 2)


def test_importance_weighs_the_loss_but_not_what_is_observed() -> None:
    clean = torch.randn(3, 2, 4, 4)
    parameter = torch.ones((), requires_grad=True)
    plain, weighed = Fixed(0.7), Fixed(0.7, weight=3.0)
    losses = [seeded(EDMLoss(noise), lambda x, s: parameter * shrink(x, s), clean) for noise in (plain, weighed)]
    torch.testing.assert_close(losses[1], 3 * losses[0])
    sigma, observed = weighed.seen[0]
    assert torch.equal(sigma, torch.full((3,), 0.7))
    assert not observed.requires_grad
    assert torch.equal(observed, losses[0])


def test_the_importance_is_that_of_the_law_which_was_drawn_from() -> None:
    """Observing first would weigh by a law that was not drawn from."""
    noise = AdaptiveNoise(num_bins=4, decay=0.0)
    clean = torch.randn(64, 2, 4, 4)
    first = seeded(EDMLoss(noise), shrink, clean)
    torch.testing.assert_close(first, seeded(EDMLoss(AdaptiveNoise(num_bins=4, decay=0.0).eval()), shrink, clean))
    assert not torch.allclose(noise.probabilities(), torch.full((4,), 0.25))


def test_learned_weighting_learns_and_the_adaptive_law_sees_the_error_alone() -> None:
    learned, noise = LearnedWeighting(), Fixed(0.7)
    nn.init.normal_(learned.weight)
    clean = torch.randn(3, 2, 4, 4)
    loss = seeded(EDMLoss(noise, learned), shrink, clean)
    plain = seeded(EDMLoss(Fixed(0.7)), shrink, clean)
    u = learned.log_loss(torch.full((3,), 0.7))
    torch.testing.assert_close(loss, plain / u.exp() + u)
    torch.testing.assert_close(noise.seen[0][1], (plain / u.exp()).detach())
    loss.sum().backward()
    assert learned.weight.grad is not None


def test_gradient_reaches_the_network_only_through_the_denoiser() -> None:
    scale = torch.ones((), requires_grad=True)
    EDMLoss()(lambda x, sigma: scale * x, torch.randn(2, 3, 4, 4)).sum().backward()
    assert scale.grad is not None
    assert scale.grad.isfinite()


@pytest.mark.parametrize(
    "noise",
    [LogNormal(-1.2, 1.2, 0.002, 80), MatchedLogNormal(), UniformTimesteps(), Stratified(), AdaptiveNoise().to("meta")],
)
def test_the_loss_never_looks_at_the_device(noise: NoiseDistribution) -> None:
    """On the meta device there are no values to look at: what runs there makes no host wait."""
    loss = EDMLoss(noise, LearnedWeighting().to("meta"))
    for preconditioning in (EDMPreconditioning(), EpsPreconditioning(), VPPreconditioning(), IDDPMPreconditioning()):
        assert loss(wrap(preconditioning), torch.empty(3, 2, 4, 4, device="meta")).shape == (3,)


def test_stateful_parts_are_found_however_deep() -> None:
    learned, adaptive = LearnedWeighting(), AdaptiveNoise()

    @dataclass(frozen=True)
    class Sum(DiffusionLoss):
        first: DiffusionLoss
        second: DiffusionLoss

        def __call__(self, denoise: Denoise, clean: Tensor) -> Tensor:
            return self.first(denoise, clean) + self.second(denoise, clean)

    assert EDMLoss().stateful_parts() == EDMLoss(Stratified(LogNormal())).stateful_parts() == []
    assert EDMLoss(adaptive, learned).stateful_parts() == [adaptive, learned]
    assert Sum(EDMLoss(adaptive), EDMLoss(weighting=learned)).stateful_parts() == [adaptive, learned]


def test_training_learns_the_best_denoiser_of_gaussian_data() -> None:
    """For N(mu, sd^2) it is mu + sd^2 / (sd^2 + sigma^2) (x - mu); for mu = 0 the best F is 0 and the loss stays 1."""
    gain, preconditioning = torch.zeros(2, requires_grad=True), EDMPreconditioning()
    optimizer = torch.optim.SGD([gain], lr=0.1)
    loss = EDMLoss(Stratified(LogNormal()))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return preconditioning.denoise(lambda x, c_noise: gain[0] * x + gain[1], x, sigma)

    with torch.no_grad():
        gain += 0.5
    for _ in range(60):
        optimizer.zero_grad()
        loss(denoise, 0.5 * torch.randn(64, 3, 8, 8)).mean().backward()
        optimizer.step()
    assert gain.abs().max() < 0.02
    assert loss(denoise, 0.5 * torch.randn(256, 3, 8, 8)).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("offset", [0.0, 0.1, 2.0])
def test_noise_offset_keeps_sigma_true(offset: float) -> None:
    """The variance of each element stays sigma^2; that of a channel's mean grows as it says."""
    seen: list[Tensor] = []

    def watch(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return x

    torch.manual_seed(0)
    EDMLoss(Fixed(3.0), noise_offset=offset)(watch, torch.zeros(20_000, 4, 2, 2))
    (noise,) = seen
    assert noise.std().item() == pytest.approx(3.0, rel=0.01)
    expected = 9 * (1 / 4 + offset**2) / (1 + offset**2)  # of the mean over 4 places
    assert noise.mean((2, 3)).var().item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_input_perturbation_is_that_of_ning_et_al(gamma: float) -> None:
    """Written out for eps: x_t = sqrt(abar) y + sqrt(1 - abar) (e + gamma xi), and the network is to predict e."""
    schedule, t, clean = TimestepSchedule(), 400, torch.randn(3, 4, 8, 8)
    sigma = schedule.sigmas()[t].item()
    torch.manual_seed(0)
    xi = torch.randn_like(clean) if gamma else torch.zeros_like(clean)
    e = torch.randn_like(clean)
    abar = 1 / (1 + sigma**2)
    predicted = network(abar**0.5 * clean + (1 - abar) ** 0.5 * (e + gamma * xi), torch.full((3,), t))
    expected = (predicted - e).square().mean((1, 2, 3))
    loss = EDMLoss(Fixed(sigma), SNRWeighting(), input_perturbation=gamma)
    torch.testing.assert_close(seeded(loss, wrap(EpsPreconditioning()), clean), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["noise_offset", "input_perturbation"])
@pytest.mark.parametrize("value", [-0.1, math.inf])
def test_strengths_of_noise_are_checked(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"EDMLoss.{key} must be finite and not negative, got {value}"):
        EDMLoss(**{key: value})  # type: ignore[arg-type]


def test_a_mask_weighs_the_squared_error_of_each_place() -> None:
    clean, mask = torch.randn(2, 4, 8, 8), torch.rand(2, 1, 8, 8)
    loss = EDMLoss(Fixed(0.7), UnitWeighting())
    torch.manual_seed(0)
    noisy = clean + 0.7 * torch.randn_like(clean)
    error = (shrink(noisy, torch.full((2,), 0.7)) - clean).square()
    torch.manual_seed(0)
    torch.testing.assert_close(loss(shrink, clean, mask=mask), (mask * error).mean((1, 2, 3)))
    assert seeded(loss, shrink, clean).equal(loss_with(loss, shrink, clean, mask=torch.ones(2, 1, 8, 8)))


def loss_with(loss: EDMLoss, denoise: Denoise, clean: Tensor, **extras: Tensor) -> Tensor:
    torch.manual_seed(0)
    return loss(denoise, clean, **extras)  # type: ignore[arg-type]


def test_a_target_takes_the_place_of_the_clean_latent() -> None:
    """A teacher sees the same x and sigma; a student that equals it has no loss, and no gradient goes elsewhere."""
    clean = torch.randn(2, 4, 8, 8)

    def first_row_is_taught(x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        return torch.cat([shrink(x, sigma)[:1], y[1:]])

    loss = EDMLoss(Fixed(0.7), input_perturbation=0.1)
    torch.manual_seed(0)
    taught = loss(shrink, clean, first_row_is_taught)
    plain = seeded(loss, shrink, clean)
    assert taught[0] == 0 < plain[0]
    assert taught[1] == plain[1]


def test_noise_is_the_same_in_every_memory_layout() -> None:
    """Convolutions may leave latents with channels last; those from a cache are contiguous."""
    clean = torch.randn(2, 4, 8, 8)
    loss = EDMLoss(Fixed(0.7), noise_offset=0.1, input_perturbation=0.1)
    last = clean.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(seeded(loss, shrink, last), seeded(loss, shrink, clean))
