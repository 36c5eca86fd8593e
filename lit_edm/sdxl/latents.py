"""The latent space of a VAE, normalised as its config says."""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_edm.cache import fingerprint
from lit_edm.edm.draws import unit_noise_like
from lit_edm.sdxl.placement import at_hand, place_frozen

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class LatentSpace(nn.Module):
    """Maps pixels to normalised latents and back: latents = (z - latents_mean) * scaling_factor / latents_std.

    The mean and std are those of the VAE's own config (Playground v2.5 has them, SDXL does not).

    Args:
        vae: The frozen VAE.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, vae: "AutoencoderKL") -> None:
        super().__init__()
        self.vae: Any = vae  # diffusers' annotations of what it returns are not what it returns
        self.vae.enable_slicing()  # one image at a time: several gain no time and take gigabytes each
        mean = vae.config["latents_mean"] or [0.0] * vae.config["latent_channels"]
        std = vae.config["latents_std"] or [1.0] * vae.config["latent_channels"]
        scale = torch.tensor(std) / vae.config["scaling_factor"]
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)

    @property
    def factor(self) -> int:
        """Pixels a side of one latent."""
        return vae_factor(self.vae.config)

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Returns the shape (C, H / factor, W / factor) of the latents of an image."""
        return self.vae.config.latent_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def moments(self, image: Tensor) -> Tensor:
        """Returns mean and log-variance (B, 2C, H / factor, W / factor), float32, of z given pixels in [-1, 1]."""
        with at_hand(self.vae, image.device), self._own_precision(image):
            return self.vae.encode(image.to(self.vae.dtype)).latent_dist.parameters.float()

    def sample(self, moments: Tensor) -> Tensor:
        """Samples normalised latents (B, C, h, w), float32, of moments (B, 2C, h, w)."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        z = DiagonalGaussianDistribution(moments)
        return (z.mean + z.std * unit_noise_like(z.mean) - self.mean) / self.scale

    def encode(self, image: Tensor) -> Tensor:
        """Samples normalised latents (B, C, H / factor, W / factor), float32, of pixels (B, 3, H, W) in [-1, 1]."""
        return self.sample(self.moments(image))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes normalised latents (B, C, h, w) to pixels (B, 3, H, W), about [-1, 1], float32."""
        with at_hand(self.vae, latents.device), self._own_precision(latents):
            return self.vae.decode((latents * self.scale + self.mean).to(self.vae.dtype)).sample.float()

    def release(self) -> None:
        """Takes the VAE off the device; it comes back while something is to be encoded or decoded."""
        place_frozen(self.vae, "cpu")

    @cached_property
    def fingerprint(self) -> str:
        """What names this encoder, weights and settings included; all of the frozen weights are read for it, once."""
        return fingerprint(self.vae.state_dict(), json.dumps(dict(self.vae.config), sort_keys=True, default=str))

    def _own_precision(self, tensor: Tensor) -> torch.autocast:
        # SDXL's VAE overflows in half precision: where it is held in float32, autocast must not undo that.
        return torch.autocast(tensor.device.type, enabled=False)


def vae_factor(config: Mapping[str, Any]) -> int:
    """Returns the pixels a side of one latent, of a VAE by its config."""
    return 2 ** (len(config["block_out_channels"]) - 1)
