"""Layers of a network by name: which of them a pattern means, and under which key of the config it was written."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lit_edm.errors import InputError

B_LORA = {"content": "up_blocks.0.attentions.0", "style": "up_blocks.0.attentions.1"}
"""The two blocks of SDXL's UNet that hold what is shown and how (B-LoRA, Frenkel et al., 2024)."""


def matches(name: str, pattern: str) -> bool:
    """Tells whether a layer is, or is a part of, what a pattern means.

    Args:
        name: Full name of the layer, such as up_blocks.0.attentions.1.proj_in.
        pattern: Name of a layer or of a block, in which * stands for any text: up_blocks.0, *.attn2; or content or
            style, the two blocks of B-LoRA. The second text encoder's text_model. in front may be left out, so that
            one pattern serves both encoders.
    """
    name = name.removeprefix("text_model.")
    pattern = B_LORA.get(pattern, pattern).removeprefix("text_model.")
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def chosen(names: Sequence[str], patterns: Iterable[str], key: str) -> list[str]:
    """Returns the names that a pattern matches, in their order; all of them if there is no pattern.

    Raises:
        InputError: A pattern matches none of the names; key says where it was written.
    """
    patterns = tuple(patterns)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise InputError(f"{key}: {pattern} is no layer that could be trained; there are {examples(names)}")
    return [name for name in names if not patterns or any(matches(name, pattern) for pattern in patterns)]


def ends_with(name: str, end: str) -> bool:
    """Tells whether a layer's full name is, or ends with, a name such as to_out.0."""
    return name == end or name.endswith(f".{end}")


def examples(names: Sequence[str]) -> str:
    """Returns the first and the last of some names, for a message."""
    return f"{names[0]} to {names[-1]}" if names else "none"


def is_text_encoder(network: nn.Module) -> bool:
    """Tells a CLIP text encoder from a UNet: models of transformers, not those of diffusers, embed tokens."""
    return hasattr(network, "get_input_embeddings")


def adapter_key(network: nn.Module) -> str:
    """Returns the key of the config under which the adapter of a network is given."""
    return f"model.init_args.{'text_encoder_adapter' if is_text_encoder(network) else 'adapter'}"


def network_name(network: nn.Module) -> str:
    """Returns what a pipeline calls a network: unet, text_encoder, or text_encoder_2, whose features are projected."""
    if not is_text_encoder(network):
        return "unet"
    return "text_encoder_2" if hasattr(network, "text_projection") else "text_encoder"


def published_name(network: nn.Module, name: str) -> str:
    """Returns the name that published files have for a layer: transformers 5 has flattened the first text encoder."""
    flattened = is_text_encoder(network) and not hasattr(network, "text_model")
    return f"text_model.{name}" if flattened else name
