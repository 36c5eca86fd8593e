"""From what a run or another program has left to the formats that programs read: what scripts/export.py does."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lit_edm.errors import InputError
from lit_edm.modules.sdxl import SDXLModule
from lit_edm.sdxl import SDXLCheckpoint
from lit_edm.sdxl.export import Exported, Format, export, write_adapter
from lit_edm.sdxl.formats import Precision, read_adapter, trains_weights, write_merged
from lit_edm.sdxl.injection import weights_of


def convert(
    source: Path,
    output: Path,
    formats: Sequence[Format] = ("diffusers",),
    precision: Precision = "float32",
    base: str | None = None,
) -> Exported | None:
    """Writes a checkpoint of a run, or an adapter, in other formats, or as a part of a whole checkpoint.

    Args:
        source: A .ckpt file of SDXLModule, averaged weights before others, or an adapter's file or folder: of
            diffusers, kohya or LyCORIS.
        output: Folder to write; the files are named after it.
        formats: Layouts of the adapter.
        precision: Of all weights.
        base: Folder or Hub name of what the adapter is merged into, for a whole checkpoint in place of an adapter.

    Returns:
        What was written of which network; None for a whole checkpoint.

    Raises:
        InputError: The source cannot be read, holds nothing, or is for another base.
    """
    if Path(source).suffix == ".ckpt":
        return convert_module(load_module(source), output, formats, precision, base)
    weights = read_adapter(source)
    if base is None:
        return write_adapter(weights, output, output.name, formats, precision)
    write_merged(SDXLCheckpoint(base), weights, output, precision)
    return None


def convert_module(
    module: SDXLModule, output: Path, formats: Sequence[Format], precision: Precision, base: str | None
) -> Exported | None:
    """Writes what a module has trained; see convert."""
    first, second = module.conditioner.encoders
    networks = {"unet": module.denoiser.unet, "text_encoder": first, "text_encoder_2": second}
    new = module.conditioner.new_embeddings(), module.placeholders.counts
    if base is None:
        return export(networks, output, output.name, *new, formats, precision)
    checkpoint = module.checkpoint if base == module.checkpoint.pretrained else SDXLCheckpoint(base)
    whole = {name: network for name, network in networks.items() if trains_weights(network)}
    write_merged(checkpoint, weights_of(networks, *new), output, precision, whole, module.pool_at_end)
    return None


def load_module(path: Path) -> SDXLModule:
    """Loads a checkpoint of a run of the command line, with the average in place of the weights where there is one.

    Raises:
        InputError: There is no such file, it is damaged, or it is not of such a run: modules built in Python leave
            their arguments to those who load them, for convert_module.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        class_path = checkpoint["hyper_parameters"]["_class_path"]
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file; name a checkpoint of a run") from error
    except (OSError, EOFError, UnpicklingError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: it is damaged, or no checkpoint of a run of lit-edm; name another one") from error
    if not class_path.endswith(".SDXLModule"):
        raise InputError(f"{path}: it is of {class_path}; only what an SDXLModule has trained can be exported")
    with warnings.catch_warnings():  # about every frozen weight, which the base has
        warnings.filterwarnings("ignore", message="Found keys that are in the model state dict")
        module = SDXLModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in checkpoint["callbacks"].get("ExponentialMovingAverage", {}).get("average", {}).items():
            parameters[name].copy_(value)
    return module.eval()
