"""Classifier-free guidance of SDXL's denoiser, both halves of it in one call of the network."""

from functools import partial
from math import inf

import torch
from torch import Tensor

from lit_edm.edm import Denoise
from lit_edm.edm.shapes import append_dims
from lit_edm.sdxl.conditioning import Conditioning
from lit_edm.sdxl.denoiser import SDXLDenoiser


def guided_at_once(
    denoiser: SDXLDenoiser,
    conditioning: Conditioning,
    negative: Conditioning,
    scale: float,
    sigma_min: float = 0.0,
    sigma_max: float = inf,
) -> Denoise:
    """Returns what `lit_edm.edm.guided` does, by one call of the network for D and D_u together.

    Args:
        denoiser: D(x; sigma), given a conditioning.
        conditioning: What pictures show.
        negative: What guidance leads away from.
        scale: Strength of the guidance; 1 is none.
        sigma_min: Noise level below which there is no guidance, >= 0.
        sigma_max: Noise level above which there is no guidance.
    """
    unguided = partial(denoiser, conditioning=conditioning)
    both = Conditioning(*(torch.cat(pair) for pair in zip(negative, conditioning, strict=True)))
    limited = sigma_min > 0 or sigma_max < inf

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        inside = (sigma > sigma_min) & (sigma <= sigma_max)
        if limited and not inside.any():
            return unguided(x, sigma)
        unconditional, conditional = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        strength = append_dims(torch.where(inside, scale, 1.0), x.ndim)
        return unconditional + strength * (conditional - unconditional)

    return unguided if scale == 1 else denoise
