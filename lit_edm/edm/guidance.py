"""Classifier-free guidance of a denoiser (Ho and Salimans 2022), within an interval of noise levels."""

from math import inf

import torch
from torch import Tensor

from lit_edm.edm.loss import Denoise
from lit_edm.edm.shapes import append_dims


def guided(
    denoise: Denoise, unconditional: Denoise, scale: float, sigma_min: float = 0.0, sigma_max: float = inf
) -> Denoise:
    """Returns D_u + scale (D - D_u) where sigma_min < sigma <= sigma_max, and D elsewhere (Kynkäänniemi et al. 2024).

    Where no example of the batch is guided D_u is not called. With a limited interval that takes one look at sigma,
    for which the host waits for the device; without one, or with scale 1, it does not.

    Args:
        denoise: D(x; sigma), given the caption.
        unconditional: D_u(x; sigma), given the negative or the empty caption.
        scale: Strength of the guidance; 1 is none.
        sigma_min: Noise level below which there is no guidance, >= 0.
        sigma_max: Noise level above which there is no guidance.
    """
    limited = sigma_min > 0 or sigma_max < inf

    def denoise_guided(x: Tensor, sigma: Tensor) -> Tensor:
        denoised = denoise(x, sigma)
        inside = (sigma > sigma_min) & (sigma <= sigma_max)
        if limited and not inside.any():
            return denoised
        excess = append_dims(torch.where(inside, scale - 1, 0.0), x.ndim)
        return denoised + excess * (denoised - unconditional(x, sigma))

    return denoise if scale == 1 else denoise_guided
