"""Reads adapters: files of diffusers, kohya and LyCORIS, whoever wrote them, with new tokens' embeddings or without.

The keys tell the format. What is not understood is an error: nothing is left out.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_edm.errors import InputError
from lit_edm.sdxl.formats.factors import update_of
from lit_edm.sdxl.formats.headers import TOKENS_KEY, AdapterMetadata, header_object
from lit_edm.sdxl.formats.keys import embeddings_at, factor_at
from lit_edm.sdxl.updates import AdapterWeights, LayerUpdate

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for LoRA weights in a folder."""

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
"""How the names of files end that torch.save writes."""


def read_adapter(path: Path | str) -> AdapterWeights:
    """Reads an adapter.

    Args:
        path: A safetensors file, or a folder of some, as SaveAdapter writes it. The same weights may be in a folder in
            several formats: of each network the first file that has it counts, diffusers' before the others.

    Raises:
        InputError: There is no such file, it is damaged, or it holds what is not known.
    """
    path = Path(path)
    if not path.is_dir():
        return read_file(path)
    files = sorted(path.glob("[!.]*.safetensors"), key=lambda file: (file.name != LORA_FILE, file.name))
    if not files:
        raise InputError(f"{path}: there is no .safetensors file in this folder; name an adapter's file or folder")
    parts = [read_file(file) for file in files]
    with_tokens = next((part for part in parts if part.embeddings), parts[0])
    networks = {name: layers for part in reversed(parts) for name, layers in part.networks.items()}
    return replace(with_tokens, networks=networks, metadata=parts[0].metadata)


def read_file(path: Path) -> AdapterWeights:
    """Reads one file of an adapter; see read_adapter."""
    tensors, header = contents(path)
    layers: dict[tuple[str, str], dict[str, Tensor]] = {}
    words: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if at := embeddings_at(key):
            words.setdefault(at[0], {})[at[1]] = value.float().reshape(-1, value.shape[-1] if value.ndim else 1)
        elif place := factor_at(key):
            layers.setdefault(place[:2], {})[place[2]] = value
        else:
            raise InputError(f"{path}: {key} is no part of an SDXL adapter that is known here; choose another file")
    embeddings, tokens = joined(words, header_object(header, TOKENS_KEY, path), path)
    return AdapterWeights(updates_of(layers, AdapterMetadata.read(header, path), path), embeddings, tokens, header)


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the header's entries of a safetensors file.

    Raises:
        InputError: There is no such file, or it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118, no dict
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file; name a .safetensors file or a folder of them") from error
    except (SafetensorError, OSError) as error:
        if path.suffix in PICKLES:
            raise InputError(
                f"{path}: a {path.suffix} file could run code as it is loaded, and so is not; name a .safetensors file"
            ) from error
        raise InputError(f"{path}: this is no safetensors file, or a damaged one ({error}); fetch it again") from error


def updates_of(
    layers: Mapping[tuple[str, str], Mapping[str, Tensor]], metadata: AdapterMetadata, path: Path
) -> dict[str, dict[str, LayerUpdate]]:
    """Returns the updates of factors that have been read, by network and layer."""
    networks: dict[str, dict[str, LayerUpdate]] = {}
    for (network, layer), factors in layers.items():
        shape = factors["lora_down.weight"].shape if "lora_down.weight" in factors else ()
        rank = shape[0] if shape else 0
        scale = metadata.scale(network, layer, rank) if rank else None
        try:
            networks.setdefault(network, {})[layer] = update_of(factors, scale)
        except InputError as error:
            raise InputError(f"{path}: {network}.{layer}: {error}") from error
    return networks


def joined(
    words: Mapping[str, Mapping[str, Tensor]], counts: Mapping[str, int], path: Path
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Returns all words' embeddings and numbers of tokens, in the order of counts where the header tells it.

    Raises:
        InputError: A text encoder's embeddings are missing, or are more than the other's or than counts tells.
    """
    for word, rows in words.items():
        if rows.keys() != {"clip_l", "clip_g"} or len(rows["clip_l"]) != len(rows["clip_g"]):
            shapes = {name: tuple(value.shape) for name, value in rows.items()}
            raise InputError(f"{path}: embeddings {word} must have as many rows clip_l as clip_g, but it has {shapes}")
    order = sorted(words, key=lambda word: [*counts, word].index(word))
    if not order:
        return {}, {}
    embeddings = {name: torch.cat([words[word][name] for word in order]) for name in ("clip_l", "clip_g")}
    if known := {word: len(words[word]["clip_l"]) for word in order if word}:
        return embeddings, known
    rows = len(embeddings["clip_l"])
    if counts and not (all(type(n) is int and n > 0 for n in counts.values()) and sum(counts.values()) == rows):
        raise InputError(f"{path}: its header tells of other tokens than the {rows} it has; have it exported again")
    return embeddings, dict(counts)
