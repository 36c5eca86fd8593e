"""Sizes of SDXL-shaped bases: for tests, for measurements on a CPU, and SDXL's own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SizeName = Literal["tiny", "small", "full"]
Settings = dict[str, Any]


@dataclass(frozen=True)
class BaseSize:
    """What the configs of a base's networks say of their sizes.

    Args:
        unet: Of UNet2DConditionModel.
        vae: Of AutoencoderKL.
        text_encoders: Of CLIPTextModel and CLIPTextModelWithProjection.
        vocabulary: Rows of the text encoders' token tables, at least 514.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoders: tuple[Mapping[str, Any], Mapping[str, Any]]
    vocabulary: int = 514


def unet_size(
    channels: tuple[int, ...],
    heads: tuple[int, ...],
    depths: tuple[int, ...],
    side: int,
    time_ids_width: int,
    **others: Any,
) -> Settings:
    """Returns settings of a UNet with cross-attention in all blocks but the first, as SDXL's.

    Args:
        channels: Of each block.
        heads: Of attention in each block; diffusers calls them attention_head_dim.
        depths: Transformer layers of each block.
        side: Of the latents that it is for.
        time_ids_width: Of the embedding of each of the six numbers that say an image's sizes.
        others: Further settings.
    """
    with_attention = len(channels) - 1
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * with_attention,
        "up_block_types": ("CrossAttnUpBlock2D",) * with_attention + ("UpBlock2D",),
        "attention_head_dim": heads,
        "transformer_layers_per_block": depths,
        "sample_size": side,
        "addition_time_embed_dim": time_ids_width,
        **others,
    }


def vae_size(channels: tuple[int, ...], **others: Any) -> Settings:
    """Returns settings of a VAE with so many channels in each block, whose factor is 2 ** (blocks - 1)."""
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        **others,
    }


def text_size(width: int, layers: int, heads: int, mlp: int, projection: int, act: str = "quick_gelu") -> Settings:
    """Returns settings of a CLIP text encoder."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "projection_dim": projection,
        "hidden_act": act,
    }


SIZES: dict[SizeName, BaseSize] = {
    "tiny": BaseSize(
        unet_size((16, 32), (2, 4), (1, 2), 32, 8, layers_per_block=1, norm_num_groups=4),
        vae_size((8, 16), norm_num_groups=4),
        (text_size(32, 2, 2, 64, projection=48), text_size(48, 2, 2, 96, projection=48)),
    ),
    "small": BaseSize(
        unet_size((48, 96, 192), (1, 2, 4), (1, 2, 10), 32, 32, norm_num_groups=16),
        vae_size((16, 32, 64, 64), norm_num_groups=16, layers_per_block=2),
        (text_size(128, 12, 2, 512, projection=128), text_size(192, 32, 3, 768, projection=192, act="gelu")),
    ),
    "full": BaseSize(
        unet_size((320, 640, 1280), (5, 10, 20), (1, 2, 10), 128, 256),
        vae_size((128, 256, 512, 512), layers_per_block=2),
        (text_size(768, 12, 12, 3072, projection=768), text_size(1280, 32, 20, 5120, projection=1280, act="gelu")),
        vocabulary=49408,
    ),
}
"""Tiny: about 0.4 million parameters in the UNet, VAE of factor 2. Small: SDXL's layers, each narrower, 58 million in
the UNet, of which a LoRA of rank 8 updates the same 560 layers. Full: SDXL 1.0, 2,567 million."""
