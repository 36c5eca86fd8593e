"""Distances between sets of images."""

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class FrechetDistance(Metric):
    """|mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) of the moments of two sets (Dowson and Landau 1982).

    On pixels it is exact and cheap up to some 32 px; on features of a network it is what Heusel et al. (2017) call FID.
    It does not vanish between finite samples of one distribution: compare with two sets of true images.

    Args:
        features: Maps images (B, ...) to features (B, D); their pixels if not given.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, features: nn.Module | None = None) -> None:
        super().__init__()
        self.features = nn.Flatten() if features is None else features.eval()
        # One row each for the two sets; D is known from the first images on.
        self.add_state("count", torch.zeros(2, dtype=torch.float64), "sum")
        self.add_state("total", torch.zeros(2, 1, dtype=torch.float64), "sum")
        self.add_state("outer", torch.zeros(2, 1, 1, dtype=torch.float64), "sum")

    @torch.no_grad()
    def update(self, images: Tensor, real: bool) -> None:
        """Adds images (B, ...) to the real or to the other set."""
        x = self.features(images).double()
        member = torch.tensor([real, not real], dtype=torch.float64, device=x.device)
        self.count = self.count + member * len(x)
        self.total = self.total + member[:, None] * x.sum(dim=0)
        self.outer = self.outer + member[:, None, None] * (x.T @ x)

    def compute(self) -> Tensor:
        """Returns the distance, a float64 scalar.

        Raises:
            ValueError: A set has fewer than two images.
        """
        if self.count.min() < 2:
            raise ValueError(f"FrechetDistance needs two images or more of each set, got {self.count.tolist()}")
        mean = self.total / self.count[:, None]
        scatter = self.outer - self.count[:, None, None] * mean[:, :, None] * mean[:, None, :]
        covariance = scatter / (self.count[:, None, None] - 1)
        # tr (C_1 C_2)^(1/2) is the sum of the singular values of C_1^(1/2) C_2^(1/2), exact also where C is singular.
        root = symmetric_root(covariance)
        trace = covariance.diagonal(dim1=1, dim2=2).sum() - 2 * torch.linalg.svdvals(root[0] @ root[1]).sum()
        return (mean[0] - mean[1]).square().sum() + trace


def symmetric_root(matrix: Tensor) -> Tensor:
    """Returns the symmetric square roots (..., D, D) of positive semidefinite matrices (..., D, D)."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
