"""A small U-Net for images of 8 to 64 pixels: enough to see the paper at work in minutes on a CPU."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class SmallUNet(nn.Module):
    """F(x; c_noise, class): residual blocks at halved resolutions, attention at the lowest.

    Its last layer is zero at first, so that F = 0 and every noise level starts at an EDM loss of 1.

    Args:
        in_channels: Channels of the images.
        num_classes: Classes K; class K, one more, stands for any. The network takes no labels if not given.
        channels: Channels at full resolution, a multiple of 4.
        multipliers: Channels at each resolution as multiples of that; each resolution is half the one before.
        dropout: Probability of dropping an activation of a block.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int | None = None,
        channels: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        features = 4 * channels
        widths = [channels * multiplier for multiplier in multipliers]
        self.noise = nn.Sequential(
            FourierFeatures(channels), nn.Linear(channels, features), nn.SiLU(), nn.Linear(features, features)
        )
        self.classes = None if num_classes is None else nn.Embedding(num_classes + 1, features)
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down = nn.ModuleList(
            ResidualBlock(before, width, features, dropout) for before, width in pairwise([channels, *widths])
        )
        self.attention = SelfAttention(widths[-1])
        self.up = nn.ModuleList(
            ResidualBlock(below + width, width, features, dropout)
            for below, width in pairwise([widths[-1], *reversed(widths)])
        )
        self.norm = group_norm(channels * multipliers[0])
        self.last = zeroed(nn.Conv2d(channels * multipliers[0], in_channels, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Returns F (B, C, H, W) of images x (B, C, H, W), noise levels c_noise (B,) and classes (B,), int64."""
        features = self.noise(c_noise)
        if self.classes is not None and class_labels is not None:
            features = features + self.classes(class_labels)
        features = functional.silu(features)
        x, skips = self.first(x), []
        for block in self.down:
            x = block(functional.avg_pool2d(x, 2) if skips else x, features)
            skips.append(x)
        x = self.attention(x)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = functional.interpolate(x, skip.shape[-2:])
            x = block(torch.cat([x, skip], dim=1), features)
        return self.last(functional.silu(self.norm(x)))


class ResidualBlock(nn.Module):
    """Two convolutions around which the input is passed on, shifted and scaled by the features.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        features: Number of features of noise level and class.
        dropout: Probability of dropping an activation.
    """

    def __init__(self, in_channels: int, out_channels: int, features: int, dropout: float) -> None:
        super().__init__()
        self.norm_1 = group_norm(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(features, 2 * out_channels)
        self.norm_2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """Maps x (B, in_channels, H, W) and features (B, F) to (B, out_channels, H, W)."""
        scale, shift = self.modulation(features)[:, :, None, None].chunk(2, dim=1)
        residual = self.conv_1(functional.silu(self.norm_1(x)))
        residual = functional.silu(self.norm_2(residual) * (1 + scale) + shift)
        return self.skip(x) + self.conv_2(self.dropout(residual))


class SelfAttention(nn.Module):
    """Attention of every pixel to all pixels, with one head, added to the input.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.query_key_value = nn.Conv2d(channels, 3 * channels, 1)
        self.project = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (B, C, H, W) to the same shape."""
        tokens = self.query_key_value(self.norm(x)).flatten(2).transpose(1, 2)
        attended = functional.scaled_dot_product_attention(*tokens.chunk(3, dim=-1))
        return x + self.project(attended.transpose(1, 2).reshape(x.shape))


class FourierFeatures(nn.Module):
    """Cosines and sines of c_noise, at frequencies from 1/4 to 8 cycles per unit, evenly spaced in their logarithm.

    Args:
        num_features: Number of features, even.
    """

    frequencies: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        frequencies = 2 * math.pi * torch.logspace(-2, 3, num_features // 2, base=2)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Maps c_noise (B,) to features (B, num_features)."""
        phases = c_noise[:, None] * self.frequencies
        return torch.cat([phases.cos(), phases.sin()], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """Normalises groups of at least four channels, at most 32 groups, as the paper's networks do."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Sets the parameters of a layer to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
