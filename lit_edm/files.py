"""Files that are there whole or not at all, whatever interrupts their writing."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from secrets import token_hex

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets a function write a file beside its final place and moves it there, so that no half file is ever seen.

    Args:
        path: Where the file is to be; its folder is made.
        write: Writes the file to the path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{token_hex(4)}.part")  # two machines may have processes of one number
    try:
        write(part)
        with part.open("r+b") as file:
            os.fsync(file.fileno())  # else the name may reach the disk before the contents do
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Writes a safetensors file, whole or not at all, of tensors in their own precision; returns its path."""
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return write_whole(path, lambda part: save_file(contents, part, metadata={"format": "pt", **(metadata or {})}))


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """Reads a safetensors file; returns None where there is none, or one that is damaged."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


def holds_tensors(path: Path) -> bool:
    """Tells whether a path is a whole safetensors file, by its header and its length alone."""
    try:
        with safe_open(path, "pt"):
            return True
    except (FileNotFoundError, SafetensorError):
        return False
