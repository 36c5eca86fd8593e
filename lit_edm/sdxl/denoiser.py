"""The SDXL UNet as a denoiser."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_edm.edm import Preconditioning
from lit_edm.sdxl.conditioning import Conditioning
from lit_edm.sdxl.low_rank import casts_all_it_trains

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class SDXLDenoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), Eq. 7 of Karras et al. (2022).

    Everything around the network is float32; only the network's input is cast to its precision. It computes in that
    precision throughout, unless it trains float32 weights that only autocast casts: autocast has norms return float32,
    which each layer after them casts again and keeps.

    Args:
        unet: The network F.
        preconditioning: Maps sigma to the four scalings.
    """

    def __init__(self, unet: "UNet2DConditionModel", preconditioning: Preconditioning) -> None:
        super().__init__()
        self.unet = unet
        self.preconditioning = preconditioning
        self.needs_autocast = not casts_all_it_trains(unet)

    def forward(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Denoises x (B, C, h, w), float32, at noise levels sigma (B,); returns the same shape, float32."""
        dtype = self.unet.conv_in.weight.dtype
        added = {"text_embeds": conditioning.pooled.to(dtype), "time_ids": conditioning.time_ids}

        def network(x: Tensor, c_noise: Tensor) -> Tensor:
            return self.unet(x.to(dtype), c_noise, conditioning.context.to(dtype), added_cond_kwargs=added).sample

        with self.autocast(x.device.type):
            return self.preconditioning.denoise(network, x, sigma)

    def autocast(self, device: str) -> AbstractContextManager[Any]:
        """Returns the context that the network computes in on a type of device: without autocast where it can."""
        on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        spared = on and not self.needs_autocast and self.unet.conv_in.weight.dtype != torch.float32
        return torch.autocast(device, enabled=False) if spared else nullcontext()
