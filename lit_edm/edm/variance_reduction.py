# ruff: noqa: D102 (overrides are described by their base class)
"""Drawing noise levels so that the loss of a batch varies less, while its expectation stays what it is."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_edm.edm.draws import gathered
from lit_edm.edm.noise import InverseTransform, LogNormal, NoiseDistribution, uniform
from lit_edm.edm.validation import check


@dataclass(frozen=True)
class Stratified(NoiseDistribution):
    """Spreads a batch evenly over a distribution: one draw from each of B equally likely strata, in random order.

    The strata are those of the whole batch where processes share it out.

    Args:
        noise: The distribution.
    """

    noise: InverseTransform = LogNormal()

    def __call__(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        jitter = uniform((batch_size,), generator)
        stratum = torch.randperm(batch_size, device=jitter.device, generator=generator)
        return self.noise.at((stratum + jitter) / batch_size, device)

    def importance(self, sigma: Tensor) -> Tensor:
        return self.noise.importance(sigma)

    def observe(self, sigma: Tensor, loss: Tensor) -> None:
        self.noise.observe(sigma, loss)


class AdaptiveNoise(nn.Module, NoiseDistribution):
    """Draws more often where the loss is large, and weighs those examples less: importance sampling of sigma.

    The range of a distribution is cut into bins of equal probability. Bin k is drawn with probability proportional to
    sqrt(E[loss^2 | k]) (Nichol and Dhariwal 2021, Eq. 18), which of all laws makes the loss vary least, mixed with
    1 / num_bins; within a bin the law is that of the distribution. `importance` keeps the expected loss what it was.

    Args:
        noise: The distribution to train on; if it is discrete, num_bins must divide the number of its values.
        num_bins: Bins K, positive.
        decay: Weight that the mean of squared losses keeps at each loss seen in a bin, in [0, 1).
        floor: Share of draws that are from the distribution itself, in (0, 1]; importance stays below 1 / floor.
    """

    edges: Tensor
    squared_loss: Tensor

    def __init__(
        self, noise: InverseTransform = LogNormal(), num_bins: int = 25, decay: float = 0.98, floor: float = 0.1
    ) -> None:
        super().__init__()
        self.noise = noise
        self.num_bins = num_bins
        self.decay = decay
        self.floor = floor
        check(self, "num_bins", num_bins > 0, "positive")
        check(self, "num_bins", noise.num_values % num_bins == 0, f"a divisor of the law's {noise.num_values} values")
        check(self, "decay", 0 <= decay < 1, "in [0, 1)")
        check(self, "floor", 0 < floor <= 1, "in (0, 1]")
        inner = torch.arange(1, num_bins, dtype=torch.float64, device="cpu") / num_bins
        self.register_buffer("edges", noise.quantile(inner).float(), persistent=False)
        self.register_buffer("squared_loss", torch.ones(num_bins))

    def forward(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        """Returns sigma of shape (B,).

        The bins are drawn on the device, which knows the losses, from a candidate for every bin made on the host,
        which knows float64: neither waits for the other.
        """
        u = uniform((self.num_bins + 1, batch_size), generator)
        bins = torch.arange(self.num_bins, device=u.device)[:, None]
        candidates = self.noise.at((bins + u[1:]) / self.num_bins, device)
        threshold = u[0].float().to(device, non_blocking=True)
        cumulative = self.probabilities().to(device).cumsum(0)
        drawn = torch.searchsorted(cumulative, threshold).clamp(max=self.num_bins - 1)
        return candidates.gather(0, drawn[None])[0]

    def probabilities(self) -> Tensor:
        """Returns the probability of each bin, shape (K,)."""
        rms = self.squared_loss.sqrt()
        return self.floor / self.num_bins + (1 - self.floor) * rms / rms.sum()

    def importance(self, sigma: Tensor) -> Tensor:
        return 1 / (self.num_bins * self.probabilities().to(sigma.device)[self._bin(sigma)])

    @torch.no_grad()
    def observe(self, sigma: Tensor, loss: Tensor) -> None:
        """Moves the mean of squared losses of each bin towards those seen at sigma (B,), in training mode only."""
        if not self.training:
            return
        device = self.squared_loss.device
        sigma, squared_loss = gathered(sigma), gathered(loss).to(device) ** 2
        member = self._bin(sigma).to(device) == torch.arange(self.num_bins, device=device)[:, None]
        member = member & squared_loss.isfinite()  # float16 may overflow, and such a step is skipped
        count = member.sum(1)
        mean = torch.where(member, squared_loss, 0).sum(1) / count.clamp(min=1)
        self.squared_loss.lerp_(mean, 1 - self.decay**count)

    def _bin(self, sigma: Tensor) -> Tensor:
        """Returns the bin of each sigma (B,)."""
        return torch.searchsorted(self.edges.to(sigma.device), sigma, right=True)
