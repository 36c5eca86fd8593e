"""The parts of a checkpoint as files: safetensors alone, so that a stranger's weights can run nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lit_edm.errors import InputError
from lit_edm.sdxl.hub import first_sentence


def load_part(key: str, source: str, part: str, from_pretrained: Callable[..., Any], **settings: Any) -> Any:
    """Loads a part as diffusers or transformers do.

    Args:
        key: What messages call the setting that names the checkpoint.
        source: Folder or Hub name.
        part: Its sub-folder; empty for a model that is all there is.
        from_pretrained: Of the part's class.
        settings: For from_pretrained; variant is that of the weights' file.

    Raises:
        InputError: Its files are missing or damaged, or are those of something else.
    """
    check_part(key, source, part, settings.get("variant"))
    try:
        return from_pretrained(source, subfolder=part or None, **settings)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{key}: {part or 'the model'} of {source} cannot be loaded ({first_sentence(error)}); fetch it again, or "
            "name another base"
        ) from error


def check_part(key: str, source: str, part: str, variant: str | None) -> None:
    """Raises InputError if a folder lacks the files of a part; what is on the Hub is not looked at. See load_part."""
    folder = Path(source, part)
    names = ["tokenizer.json", "vocab.json"] if part.startswith("tokenizer") else weight_files(part, variant)
    if not Path(source).is_dir() or any((folder / name).is_file() for name in names):
        return
    there = ", ".join(sorted(path.name for path in folder.glob("[!.]*"))) or "nothing"
    variant = "" if part.startswith("tokenizer") else ", and model.init_args.variant if its safetensors have one"
    raise InputError(f"{key}: {folder} holds {there}, but no {names[0]}; name a base in diffusers' layout{variant}")


def weight_files(part: str, variant: str | None) -> list[str]:
    """Returns the names that a part's weights may have: of a single file, and of the index of several."""
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    variant = f".{variant}" if variant else ""
    return [f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"]
