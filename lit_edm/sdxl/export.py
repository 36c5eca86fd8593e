"""The files users carry away: what was trained, in the layouts that other programs read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from lit_edm.sdxl.formats import (
    LORA_FILE,
    Precision,
    trains_weights,
    write_diffusers,
    write_embeddings,
    write_kohya,
    write_network,
)
from lit_edm.sdxl.injection import weights_of
from lit_edm.sdxl.updates import AdapterWeights, LoHaUpdate, LoKrUpdate, LoRAUpdate

Format = Literal["diffusers", "kohya", "bundled"]
"""Layouts of a whole adapter: diffusers', kohya's, and kohya's with the new tokens' embeddings in the same file."""


@dataclass(frozen=True)
class Exported:
    """What was written of which network, by their names in a pipeline: unet, text_encoder, text_encoder_2.

    Args:
        lora: Networks whose LoRA is in LORA_FILE.
        lycoris: Networks whose updates are in lycoris_file and not in LORA_FILE.
        whole: Networks that are in a folder of their name.
        lycoris_file: Name of the file in the layout of kohya and LyCORIS, whether there is one or not.
        others: Further files that hold the same, and what reads them.
    """

    lora: tuple[str, ...]
    lycoris: tuple[str, ...]
    whole: tuple[str, ...]
    lycoris_file: str
    others: Mapping[str, str] = field(default_factory=dict)


def export(
    networks: Mapping[str, nn.Module],
    folder: Path,
    name: str,
    embeddings: Mapping[str, Tensor] | None = None,
    tokens: Mapping[str, int] | None = None,
    formats: Sequence[Format] = ("diffusers",),
    precision: Precision = "float32",
) -> Exported:
    """Writes what is trained of networks, and new tokens' embeddings.

    Diffusers does not read LoHa and LoKr: where no other format is asked for, they are in <name>_lycoris.safetensors.

    Args:
        networks: UNet and text encoders by their names in a pipeline.
        folder: Where the files are to be.
        name: Stem of the names of files.
        embeddings: The new tokens' embeddings, clip_l (N, D1) and clip_g (N, D2), if there are any.
        tokens: Number of tokens of each placeholder.
        formats: Layouts to write.
        precision: Of everything written.
    """
    whole = {network: module for network, module in networks.items() if trains_weights(module)}
    for network, module in whole.items():
        write_network(module, folder / network, precision)
    written = write_adapter(weights_of(networks, embeddings, tokens), folder, name, formats, precision)
    return replace(written, whole=tuple(whole))


def write_adapter(
    weights: AdapterWeights,
    folder: Path,
    name: str,
    formats: Sequence[Format] = ("diffusers",),
    precision: Precision = "float32",
) -> Exported:
    """Writes an adapter, wherever it is from, and its new tokens' embeddings; see export."""
    if weights.embeddings:
        write_embeddings(weights, folder / f"{name}_emb.safetensors", precision)
    loras = weights.of_kind(LoRAUpdate) if "diffusers" in formats else AdapterWeights({})
    if loras.networks:
        write_diffusers(loras, folder / LORA_FILE, precision)
    files = kohya_files(weights, name, formats)
    for file in files:
        write_kohya(weights, folder / file, precision, with_embeddings=file.endswith("_bundled.safetensors"))
    missing = weights.of_kind((LoHaUpdate, LoKrUpdate)) if loras.networks else weights
    lycoris = next(iter(files), f"{name}_lycoris.safetensors")
    if missing.networks and not files:
        write_kohya(missing, folder / lycoris, precision)
    return Exported(tuple(loras.networks), tuple(missing.networks), (), lycoris, files)


def kohya_files(weights: AdapterWeights, name: str, formats: Sequence[Format]) -> dict[str, str]:
    """Returns the files asked for in kohya's layout, and what reads them; none if there is no adapter to write."""
    programs = "ComfyUI, Forge and AUTOMATIC1111, from their folder of LoRAs"
    files = {
        "kohya": (f"{name}.safetensors", programs),
        "bundled": (f"{name}_bundled.safetensors", f"{programs}; the new tokens, too, in Forge and AUTOMATIC1111"),
    }
    return dict(files[kind] for kind in ("kohya", "bundled") if kind in formats) if weights.networks else {}
