"""The files users carry away: LoRA weights and embeddings as diffusers reads them."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file
from torch import Tensor, nn

import lit_edm

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for LoRA weights in a folder."""


def lora_state_dict(unet: "UNet2DConditionModel") -> dict[str, Tensor]:
    """Returns the LoRA weights of a UNet under the names that diffusers reads.

    The scale alpha / rank is folded into B: a file without a scale loads everywhere with the right one, while
    scales stored beside the weights are lost or misread by some of the programs.
    """
    weights: dict[str, Tensor] = {}
    for name, layer in unet.named_modules():
        if "default" not in getattr(layer, "lora_A", {}):
            continue
        weights[f"unet.{name}.lora_A.weight"] = layer.lora_A["default"].weight
        weights[f"unet.{name}.lora_B.weight"] = layer.lora_B["default"].weight * layer.scaling["default"]
    return weights


def save_lora(unet: "UNet2DConditionModel", folder: Path) -> Path:
    """Writes the LoRA weights of a UNet, float32, and returns the file."""
    return save_tensors(lora_state_dict(unet), folder / LORA_FILE)


def save_embeddings(embeddings: Mapping[str, nn.Parameter], path: Path) -> Path:
    """Writes new tokens' embeddings, clip_l (N, D1) and clip_g (N, D2), float32, and returns the file."""
    return save_tensors(embeddings, path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """Writes a safetensors file, whole or not at all."""
    contents = {name: tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "software": f"lit_edm {lit_edm.__version__}"}
    return write_whole(path, lambda part: save_file(contents, part, metadata=metadata))


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets a function write a file beside its final place and moves it there, so that no half file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
