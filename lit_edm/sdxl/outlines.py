"""The networks of a base without their weights, to find what does not fit them before any are loaded: in a blink."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lit_edm.sdxl.adapters import Adapter
from lit_edm.sdxl.checkpoint import KEY, SDXLCheckpoint
from lit_edm.sdxl.conditioning import without_gradient
from lit_edm.sdxl.from_file import read_embeddings
from lit_edm.sdxl.injection import fitting
from lit_edm.sdxl.parts import load_part
from lit_edm.sdxl.updates import AdapterWeights


def check_unet(checkpoint: SDXLCheckpoint, adapter: Adapter) -> None:
    """Raises InputError if an adapter cannot be put on the UNet."""
    adapter.check(unet(checkpoint))


def check_text_encoders(
    checkpoint: SDXLCheckpoint, adapter: Adapter | None, clip_skip: int, embeddings: str | None, tokens: int
) -> None:
    """Raises InputError if an adapter or embeddings from a file cannot be put on the text encoders.

    Args:
        checkpoint: Where they are.
        adapter: What is trained of them; nothing if not given.
        clip_skip: Hidden layers to skip; those after them get no gradient.
        embeddings: File or folder that new tokens start from; none if not given.
        tokens: Number of new tokens.
    """
    first, second = text_encoder(checkpoint), text_encoder_2(checkpoint)
    if adapter is not None:
        if clip_skip + 1 < first.config.num_hidden_layers:
            adapter.check(first, without_gradient(first, clip_skip))
        adapter.check(second)
    if embeddings is not None:
        widths = {"clip_l": first.config.hidden_size, "clip_g": second.config.hidden_size}
        read_embeddings(embeddings, {name: (tokens, width) for name, width in widths.items()})


def check_weights(checkpoint: SDXLCheckpoint, weights: AdapterWeights, source: str) -> None:
    """Raises InputError if updates from a file are for another base; source is what messages call the file."""
    makers = {"unet": unet, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    for name, updates in weights.networks.items():
        fitting(updates, makers[name](checkpoint), source)


def unet(checkpoint: SDXLCheckpoint) -> Any:
    """Returns the UNet's outline."""
    from diffusers import UNet2DConditionModel

    return outline(checkpoint, "unet", UNet2DConditionModel.load_config, UNet2DConditionModel.from_config)


def adapted_unet(checkpoint: SDXLCheckpoint, adapter: Adapter | None, dtype: torch.dtype) -> Any:
    """Returns the outline of the UNet as it trains: frozen in the given precision, but for what an adapter trains."""
    network = nn.Module.to(unet(checkpoint), dtype).requires_grad_(False).train()  # diffusers' own warns of values
    with torch.random.fork_rng(devices=[]):  # which some adapters start from
        if adapter is not None:
            adapter(network)
    return network


def text_encoder(checkpoint: SDXLCheckpoint) -> Any:
    """Returns the first text encoder's outline."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return outline(checkpoint, "text_encoder", CLIPTextConfig.from_pretrained, CLIPTextModel)


def text_encoder_2(checkpoint: SDXLCheckpoint) -> Any:
    """Returns the second text encoder's outline."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return outline(checkpoint, "text_encoder_2", CLIPTextConfig.from_pretrained, CLIPTextModelWithProjection)


def outline(
    checkpoint: SDXLCheckpoint, part: str, read_config: Callable[..., Any], from_config: Callable[[Any], Any]
) -> Any:
    """Makes a part whose parameters have no values.

    Args:
        checkpoint: Where its config is.
        part: Its sub-folder.
        read_config: Reads the config of a folder or of the Hub.
        from_config: Makes the part.
    """

    def make(source: str, variant: str | None, **settings: Any) -> Any:
        with torch.device("meta"):
            return from_config(read_config(source, **settings))

    return load_part(KEY, checkpoint.pretrained, part, make, variant=checkpoint.variant, revision=checkpoint.revision)
