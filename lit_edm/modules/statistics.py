"""Statistics of a data set's clean latents, which preconditioning and noise levels follow from."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from lit_edm.errors import InputError
from lit_edm.modules.diffusion import DiffusionModule


@dataclass(frozen=True)
class LatentStatistics:
    """Moments of clean latents.

    Args:
        count: Number of images.
        sigma_data: Root of the mean square over everything, mean included.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
    """

    count: int
    sigma_data: float
    mean: list[float]
    std: list[float]

    def __str__(self) -> str:
        """Returns lines of a config, with comments."""
        mean, std = ([round(value, 4) for value in values] for values in (self.mean, self.std))
        return (
            f"# {self.count} images; of each channel mean {mean}, std {std}\n"
            f"sigma_data: {self.sigma_data:.4f}  # of preconditioning, weighting, ScaledLogNormal\n"
            f"p_mean: {-1.2 + math.log(self.sigma_data / 0.5):.4f}  # of LogNormal: the paper's -1.2 at this sigma_data"
        )


@torch.no_grad()
def latent_statistics(module: DiffusionModule, batches: Iterable[Any]) -> LatentStatistics:
    """Measures the latents that a module encodes batches to, in float64.

    Args:
        module: Its encode is asked, where its parameters are.
        batches: What it takes.

    Raises:
        InputError: There is no batch.
    """
    count, pixels, total, squares = 0, 0, torch.zeros(1).double(), torch.zeros(1).double()
    for batch in batches:
        latents = module.encode(module.transfer_batch_to_device(batch, module.device, 0)).cpu().double()
        count += len(latents)
        pixels += latents[:, 0].numel()
        total = total + latents.sum((0, 2, 3))
        squares = squares + latents.square().sum((0, 2, 3))
    if count == 0:
        raise InputError("there are no images to measure")
    mean, square = total / pixels, squares / pixels
    std = (square - mean**2).clamp(min=0).sqrt()
    return LatentStatistics(count, square.mean().sqrt().item(), mean.tolist(), std.tolist())
