"""Writes adapters: diffusers' files, kohya's and LyCORIS', embeddings apart or bundled; whole or not at all."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import lit_edm
from lit_edm.errors import InputError
from lit_edm.files import write_tensors
from lit_edm.sdxl.formats.factors import factors_of
from lit_edm.sdxl.formats.headers import diffusers_header, kohya_header, tokens_header
from lit_edm.sdxl.formats.names import kohya_name
from lit_edm.sdxl.updates import AdapterWeights, LoRAUpdate

Precision = Literal["float32", "fp16", "bf16"]
DTYPES = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_diffusers(weights: AdapterWeights, path: Path, precision: Precision = "float32") -> Path:
    """Writes LoRA and DoRA as diffusers' load_lora_weights reads them; returns the file.

    Raises:
        InputError: The adapter has LoHa or LoKr, or a network has both LoRA and DoRA, which diffusers does not read.
    """
    networks = loras_of(weights)
    return write(diffusers_tensors(networks), path, precision, diffusers_header(networks, common_rank(networks)))


def loras_of(weights: AdapterWeights) -> dict[str, dict[str, LoRAUpdate]]:
    """Returns the updates of an adapter that diffusers reads, by network and layer; see write_diffusers."""
    networks: dict[str, dict[str, LoRAUpdate]] = {}
    for network, updates in weights.networks.items():
        for layer, update in updates.items():
            if not isinstance(update, LoRAUpdate):
                kind = type(update).__name__.removesuffix("Update")
                raise InputError(f"{network}.{layer} is {kind}, which diffusers does not read; write the format kohya")
            networks.setdefault(network, {})[layer] = update
        if len({update.magnitude is None for update in networks.get(network, {}).values()}) > 1:
            raise InputError(
                f"some layers of {network} are LoRA and some DoRA, of which diffusers reads one alone; "
                "write the format kohya"
            )
    return networks


def diffusers_tensors(networks: Mapping[str, Mapping[str, LoRAUpdate]]) -> dict[str, Tensor]:
    """Returns the tensors of a file for diffusers.

    The scale is folded into B, and all layers are brought to one rank with zeros: a file without scales then loads
    everywhere with the right ones, while scales stored beside the weights, or told by ranks, are lost or misread by
    some of the programs.
    """
    rank = common_rank(networks)
    tensors: dict[str, Tensor] = {}
    for network, updates in networks.items():
        for layer, update in updates.items():
            key = f"{network}.{layer}"
            a, b = padded(update, rank)
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            if update.magnitude is not None:  # which diffusers looks for under two names
                suffix = "" if network == "unet" else ".weight"
                values = update.magnitude.reshape(1, -1, 1, 1) if a.ndim == 4 else update.magnitude
                tensors[f"{key}.lora_magnitude_vector{suffix}"] = values
    return tensors


def common_rank(networks: Mapping[str, Mapping[str, LoRAUpdate]]) -> int:
    """Returns the largest rank of all updates, 0 if there are none."""
    return max((update.rank for updates in networks.values() for update in updates.values()), default=0)


def padded(update: LoRAUpdate, rank: int) -> tuple[Tensor, Tensor]:
    """Returns A and B of the same update at scale 1, of another rank, at least its own."""
    a, b = update.a.float(), update.b.float() * update.scale
    more = rank - update.rank
    zeros = a.new_zeros(more, *a.shape[1:]), b.new_zeros(len(b), more, *b.shape[2:])
    return torch.cat([a, zeros[0]]), torch.cat([b, zeros[1]], dim=1)


def write_kohya(
    weights: AdapterWeights, path: Path, precision: Precision = "float32", with_embeddings: bool = False
) -> Path:
    """Writes any adapter in the layout of kohya's scripts and LyCORIS; returns the file.

    All layers have one alpha, that of most, and what their scale is more or less is folded into the weights: some
    programs read one alpha for all. ComfyUI divides a DoRA's rows by the norms of W, not of W + s B A as in training:
    for ComfyUI merge it into a checkpoint.

    Args:
        weights: What to write.
        path: The file.
        precision: Of all weights but the alphas.
        with_embeddings: Bundle new tokens' embeddings, for A1111 and Forge, where a prompt names the placeholder, or
            the file if the placeholders are not known.
    """
    alpha = common_alpha(weights)
    tensors = {
        f"{kohya_name(network, layer)}.{factor}": value
        for network, updates in weights.networks.items()
        for layer, update in updates.items()
        for factor, value in factors_of(update, alpha).items()
    }
    if with_embeddings:
        tensors |= bundled(weights, path.stem)
    return write(tensors, path, precision, kohya_header(weights, alpha, path.stem))


def common_alpha(weights: AdapterWeights) -> float:
    """Returns the alpha that most layers have; 1 if none has one."""
    alphas = [update.scale * update.rank for layers in weights.networks.values() for update in layers.values()]
    return Counter(alpha for alpha in alphas if alpha).most_common(1)[0][0] if any(alphas) else 1.0


def bundled(weights: AdapterWeights, name: str) -> dict[str, Tensor]:
    """Returns the embeddings of each placeholder under the keys that A1111 reads, which takes no dot in a name."""
    words = weights.tokens or {name: len(weights.embeddings.get("clip_l", ()))}
    return {
        f"bundle_emb.{word.replace('.', '_')}.{encoder}": part
        for encoder, rows in weights.embeddings.items()
        for word, part in zip(words, rows.split(list(words.values())), strict=True)
    }


def write_embeddings(weights: AdapterWeights, path: Path, precision: Precision = "float32") -> Path:
    """Writes the new tokens' embeddings alone, clip_l (N, D1) and clip_g (N, D2); returns the file."""
    return write(weights.embeddings, path, precision, tokens_header(weights.tokens))


def write(
    tensors: Mapping[str, Tensor], path: Path, precision: Precision, header: Mapping[str, str] | None = None
) -> Path:
    """Writes a safetensors file, whole or not at all; returns its path.

    Raises:
        InputError: What should be its folder is a file.
    """
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(f"{path.parent} is a file: name a folder to write to")
    contents = {
        name: value if name.endswith(".alpha") else value.to(DTYPES[precision]) for name, value in tensors.items()
    }
    return write_tensors(path, contents, {"software": f"lit_edm {lit_edm.__version__}", **(header or {})})
