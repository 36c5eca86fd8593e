"""From what a run or another program has left to the formats that programs read: what scripts/export.py does."""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from lit_edm import sdxl
from lit_edm.errors import InputError
from lit_edm.modules.sdxl import SDXLModule
from lit_edm.sdxl import Adapter, SDXLCheckpoint
from lit_edm.sdxl.export import Exported, Format, export, write_adapter
from lit_edm.sdxl.formats import Precision, read_adapter, trains_weights, write_merged
from lit_edm.sdxl.injection import weights_of

SETTINGS = ("pretrained", "vae", "variant", "revision", "tokens", "pool_at_end", "clip_skip")
"""What an export has to know of a run, beside its adapters."""


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
    module = module_of(checkpoint, path)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in checkpoint["callbacks"].get("ExponentialMovingAverage", {}).get("average", {}).items():
            if name in parameters:  # not what the loss learns, which is left out here
                parameters[name].copy_(value)
    return module.eval()


def module_of(checkpoint: dict[str, Any], path: Path) -> SDXLModule:
    """Makes the module that a checkpoint is of, without what only training needs: optimizer, loss, caches.

    The checkpoint may be a stranger's, and Lightning would import and call whatever its settings name.
    """
    settings = checkpoint["hyper_parameters"]
    adapters: dict[str, Any] = {key: adapter_of(settings.get(key), path) for key in ("adapter", "text_encoder_adapter")}
    module = SDXLModule(**{key: settings[key] for key in SETTINGS if key in settings}, **adapters)
    state = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("loss_parts.")}
    module.on_load_checkpoint({**checkpoint, "state_dict": state})
    module.load_state_dict(state, strict=False)
    return module


def adapter_of(settings: Any, path: Path) -> Adapter | None:
    """Makes an adapter of this package from a checkpoint's settings.

    Raises:
        InputError: The settings name another class.
    """
    if settings is None:
        return None
    name = str(settings["class_path"]) if isinstance(settings, dict) else str(settings)
    kind = getattr(sdxl, name.rpartition(".")[2], None) if name.startswith("lit_edm.sdxl.") else None
    if not isinstance(kind, type) or not issubclass(kind, Adapter):
        raise InputError(f"{path}: its adapter is {name}, none of this package; load it in Python, for convert_module")
    return kind(**settings.get("init_args", {}))
