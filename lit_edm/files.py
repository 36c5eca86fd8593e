"""Files that are there whole or not at all, whatever interrupts their writing."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_edm.errors import InputError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Numbers of the errors of a full disk, a used up quota, and a file beyond the system's limit."""


class NoRoomError(InputError):
    """A file could not be written, for there is no room; none of it is left."""


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Lets a function write a file beside its final place and moves it there, so that no half file is ever seen.

    Args:
        path: Where the file is to be; its folder is made.
        write: Writes the file to the path that it is given.

    Raises:
        NoRoomError: There is no room for the file; one that was there before is there still.
    """
    part = path.with_name(f".{path.name}.{token_hex(4)}.part")  # two machines may have processes of one number
    try:
        with telling_of_no_room(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.touch()
            mode = part.stat().st_mode
            write(part)
            part.chmod(mode)  # safetensors, for one, lets nobody else read what it writes
            with part.open("r+b") as file:
                os.fsync(file.fileno())  # else the name may reach the disk before the contents do
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


@contextmanager
def telling_of_no_room(path: Path) -> Iterator[None]:
    """Raises NoRoomError in place of what libraries raise when there is no room for a file."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (number := system_error(error)) not in NO_ROOM:
            raise
        reason, free = os.strerror(number), readable(shutil.disk_usage(existing(path)).free)
        raise NoRoomError(
            f"{path} could not be written: {reason}, with {free} free on its disk; make room, or write elsewhere"
        ) from error


def system_error(error: BaseException | None) -> int:
    """Returns the number of the system's error behind another one, 0 if there is none.

    torch raises its own error while the system's is handled, and safetensors has the number in its text alone.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return 0


def existing(path: Path) -> Path:
    """Returns the nearest folder above a path that is there."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def readable(size: float) -> str:
    """Returns bytes in the unit that suits their number, such as 3.1 MiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.{0 if size >= 100 or unit == 'bytes' else 1}f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


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
