"""The files users carry away: what was trained, as diffusers or the programs around LyCORIS read it."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lit_edm
from lit_edm.files import write_tensors, write_whole
from lit_edm.sdxl.layers import is_text_encoder
from lit_edm.sdxl.low_rank import updated_layers
from lit_edm.sdxl.tokens import ExtendedEmbedding

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for LoRA weights in a folder."""

LYCORIS_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
"""What kohya's and LyCORIS' files call the networks that a pipeline has under these names."""


@dataclass(frozen=True)
class Exported:
    """What was written of which network, by their names in a pipeline: unet, text_encoder, text_encoder_2.

    Args:
        lora: Networks whose LoRA is in LORA_FILE.
        lycoris: Networks whose updates are in lycoris_file.
        whole: Networks that are in a folder of their name.
        lycoris_file: Name of the file in LyCORIS' layout, whether there is one or not.
    """

    lora: tuple[str, ...]
    lycoris: tuple[str, ...]
    whole: tuple[str, ...]
    lycoris_file: str


def export(networks: Mapping[str, nn.Module], folder: Path, name: str) -> Exported:
    """Writes what is trained of networks, float32, each in the layout that its adapter has.

    Args:
        networks: UNet and text encoders by their names in a pipeline.
        folder: Where the files are to be.
        name: Stem of the LyCORIS file.
    """
    lora = {prefix: weights for prefix, net in networks.items() if (weights := lora_state_dict(net, prefix))}
    lycoris = {prefix: weights for prefix, net in networks.items() if (weights := lycoris_state_dict(net, prefix))}
    whole = {prefix: net for prefix, net in networks.items() if trains_weights(net)}
    exported = Exported(tuple(lora), tuple(lycoris), tuple(whole), f"{name}_lycoris.safetensors")
    for path, parts in ((folder / LORA_FILE, lora), (folder / exported.lycoris_file, lycoris)):
        if parts:
            save_tensors({key: value for weights in parts.values() for key, value in weights.items()}, path)
    for prefix, network in whole.items():
        save_network(network, folder / prefix)
    return exported


def lora_state_dict(network: nn.Module, prefix: str = "unet") -> dict[str, Tensor]:
    """Returns the LoRA or DoRA weights of a network under the names that diffusers reads, empty if there are none.

    The scale is folded into B, and all layers are brought to one rank with zeros: a file without scales then loads
    everywhere with the right ones, while scales stored beside the weights, or told by ranks, are lost or misread by
    some of the programs.
    """
    layers = {name: layer for name, layer in updated_layers(network).items() if hasattr(layer, "lora_A")}
    factors = {name: lora_factors(layer) for name, layer in layers.items()}
    rank = max((len(a) for a, _ in factors.values()), default=0)
    weights: dict[str, Tensor] = {}
    for name, layer in layers.items():
        key = f"{prefix}.{published_name(network, name)}"
        a, b = padded(*factors[name], rank)
        weights |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        if "default" in layer.lora_magnitude_vector:  # which diffusers looks for under two names
            suffix = ".weight" if is_text_encoder(network) else ""
            weights[f"{key}.lora_magnitude_vector{suffix}"] = layer.lora_magnitude_vector["default"].weight
    return weights


def lora_factors(layer: Any) -> tuple[Tensor, Tensor]:
    """Returns A (r, in, ...) and B (out, r, ...) of the difference B A between a trained layer and the base's."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight * layer.scaling["default"]
    if (initial := getattr(layer, "initial", None)) is None:
        return a, b
    return torch.cat([a, initial.a]), torch.cat([b, -initial.b], dim=1)


def padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns factors of the same product of another rank, at least their own."""
    more = rank - len(a)
    zeros = a.new_zeros(more, *a.shape[1:]), b.new_zeros(len(b), more, *b.shape[2:])
    return torch.cat([a, zeros[0]]), torch.cat([b, zeros[1]], dim=1)


def lycoris_state_dict(network: nn.Module, prefix: str = "unet") -> dict[str, Tensor]:
    """Returns the LoHa or LoKr weights of a network under the names of LyCORIS, empty if there are none.

    The scale is folded into the first factor, and alpha is the rank: readers do not agree on LoKr's where its factors
    are full matrices.
    """
    weights: dict[str, Tensor] = {}
    for name, layer in updated_layers(network).items():
        kinds = [kind for kind in layer.adapter_layer_names if kind.startswith(("hada_", "lokr_"))]
        factors = {kind: getattr(layer, kind)["default"] for kind in kinds if "default" in getattr(layer, kind)}
        if factors:
            first = next(iter(factors))
            factors[first] = factors[first] * layer.scaling["default"]
            key = f"{LYCORIS_PREFIXES[prefix]}_{published_name(network, name).replace('.', '_')}"
            weights |= {f"{key}.{kind}": factor for kind, factor in factors.items()}
            weights[f"{key}.alpha"] = torch.tensor(float(layer.r["default"]))
    return weights


def trains_weights(network: nn.Module) -> bool:
    """Tells whether weights of the network itself are trained, neither updates nor embeddings of new tokens."""
    added = [*updated_layers(network).values(), *(m for m in network.modules() if isinstance(m, ExtendedEmbedding))]
    apart = {id(parameter) for module in added for parameter in module.parameters()}
    return any(parameter.requires_grad and id(parameter) not in apart for parameter in network.parameters())


def save_network(network: Any, folder: Path) -> None:
    """Writes all weights, float32, and the config of a network, as its from_pretrained reads them."""
    weights = {published_name(network, name): value for name, value in network.state_dict().items()}
    if is_text_encoder(network):
        table = "text_model.embeddings.token_embedding."
        weights = {name.replace(f"{table}table.", table): value for name, value in weights.items()}
        weights.pop(f"{table}rows", None)  # new tokens are in a file of their own
        config = deepcopy(network.config)
        config.dtype = torch.float32  # which from_pretrained goes by, whatever the file holds
        file = "model.safetensors"
    else:
        config, file = network, "diffusion_pytorch_model.safetensors"
    write_whole(folder / "config.json", lambda part: part.write_text(config.to_json_string(), encoding="utf-8"))
    save_tensors(weights, folder / file)


def published_name(network: nn.Module, name: str) -> str:
    """Returns the name that published files have for a layer: transformers 5 has flattened the first text encoder."""
    flattened = is_text_encoder(network) and not hasattr(network, "text_model")
    return f"text_model.{name}" if flattened else name


def save_embeddings(embeddings: Mapping[str, Tensor], path: Path) -> Path:
    """Writes new tokens' embeddings, clip_l (N, D1) and clip_g (N, D2), float32, and returns the file."""
    return save_tensors(embeddings, path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """Writes a safetensors file, float32, whole or not at all; returns its path."""
    contents = {name: tensor.detach().cpu().float() for name, tensor in tensors.items()}
    return write_tensors(path, contents, {"software": f"lit_edm {lit_edm.__version__}"})
