"""Checkpoints: written whole or not at all, and the newest whole one to go on from."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lit_edm.errors import InputError
from lit_edm.files import NoRoomError, readable, write_whole

__all__ = ["WholeCheckpointIO"]

LEFT_BEHIND = 600.0
"""Seconds without a byte after which the part of a file is that of a writer that was killed."""


WELL_READ = 2**31
"""Bytes up to which a checkpoint is compared with its checksums: of larger ones, every process would read all."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint beside its final place and moves it there, so that a kill leaves no half one.

    Lightning's own goes through the system's folder for temporary files, whence it is copied if that is another disk,
    and holds the whole file in memory before that. Remote places are left to it. Loading takes data alone, and runs no
    code, unless weights_only is False.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint, and removes what killed writers left in its folder.

        Raises:
            InputError: There is no room for it; whatever was in the folder is there still.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        remove_parts(path.parent)
        try:
            write_whole(path, lambda part: _write(checkpoint, part))
        except NoRoomError as error:
            raise InputError(
                f"{error}. The checkpoint takes {readable(size_of(checkpoint))}; those before it are untouched: go on "
                "with --ckpt_path last"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint; without code in it unless weights_only is False, wherever it comes from."""
        return super().load_checkpoint(path, map_location, weights_only is not False)


def _write(checkpoint: dict[str, Any], part: Path) -> None:
    with part.open("wb") as file:  # torch, given a path, does not tell what the system's error was
        torch.save(checkpoint, file)


class _Counter:
    """A file that is not there, and knows how large it is."""

    size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        pass


def size_of(checkpoint: dict[str, Any]) -> int:
    """Returns how many bytes a checkpoint has as a file."""
    counter = _Counter()
    torch.save(checkpoint, counter)  # type: ignore[arg-type]
    return counter.size


def remove_parts(folder: Path) -> None:
    """Removes parts of checkpoints in a folder that nobody writes to any more.

    Whoever writes one writes all the time: a part of some minutes ago is that of a killed process. What another run is
    writing to the same folder now is left alone.
    """
    for part in folder.glob(".*.ckpt.*.part"):
        try:
            if time.time() - part.stat().st_mtime > LEFT_BEHIND:
                part.unlink()
        except FileNotFoundError:  # its writer was done with it just now
            continue


def fault_of(path: Path, resumes: bool = True, weights_only: bool | None = None) -> str | None:
    """Returns why a run cannot go on from a file, in words that follow its name, or None if it can.

    A file that was cut off is found by the list of contents at its end, one whose bits have changed, if it is not too
    large to be read for that, by the checksums that torch writes along.

    Args:
        path: The file, or the folder that a sharded checkpoint is.
        resumes: Whether training is to go on, which takes more than weights.
        weights_only: Of Trainer.fit: whether the file may hold nothing but data; True if not given.
    """
    if path.is_dir():
        whole = (path / "meta.pt").is_file() and (path / ".metadata").is_file()  # which are written last
        return None if whole else "is a folder, and not a whole sharded checkpoint"
    try:
        with ZipFile(path) as file:
            if path.stat().st_size < WELL_READ and file.testzip():
                return "is damaged"
        kept = torch.load(path, "cpu", weights_only=weights_only is not False, mmap=True)
    except UnpicklingError:
        return "holds more than data, which could be code and is not loaded"
    except Exception:  # whatever the contents of a file can lead to
        return "is damaged, or no checkpoint"
    if not isinstance(kept, dict) or "state_dict" not in kept or "loops" not in kept:
        return "is no checkpoint of a run"
    if resumes and "optimizer_states" not in kept:
        return "holds weights alone, with which training cannot go on"
    return None


def find_last(trainer: Trainer, resumes: bool = True, weights_only: bool | None = None) -> Path:
    """Returns the newest whole checkpoint of a trainer's folders.

    Newest is what was written last, not what is furthest: the folder may hold those of an earlier, longer run. All of
    them count, not last.ckpt alone, for a run may be killed before it has written that. Damaged ones are passed over
    with a warning. Processes choose alike: none writes before all of them have chosen and met.

    Args:
        trainer: Its ModelCheckpoints have dirpaths; Lightning's SLURM requeueing writes to its default_root_dir.
        resumes: Whether training is to go on, which takes more than weights.
        weights_only: Of Trainer.fit.

    Raises:
        InputError: There is none.
    """
    folders = checkpoint_folders(trainer)
    found = {path for folder in folders for path in folder.glob("*.ckpt")}
    found |= set(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))
    written: dict[Path, tuple[int, str]] = {}
    for path in found:
        with suppress(FileNotFoundError):  # a link to nothing, or deleted just now
            written[path] = path.stat().st_mtime_ns, path.name
    for path in sorted(written, key=lambda path: written[path], reverse=True):
        if (fault := fault_of(path, resumes, weights_only)) is None:
            return path
        rank_zero_warn(f"{path} {fault}: it is passed over")
    raise InputError(
        f"--ckpt_path last: there is no whole checkpoint in {' or '.join(map(str, folders)) or 'a fixed folder'}; give "
        "ModelCheckpoint a dirpath, or begin anew without --ckpt_path"
    )


def save_last(trainer: Trainer) -> str | None:
    """Saves last.ckpt in the folder of a trainer's first ModelCheckpoint that keeps more than weights.

    Returns:
        Its path, or None if there is no such folder.
    """
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    folder = next((keeper.dirpath for keeper in keepers if keeper.dirpath and not keeper.save_weights_only), None)
    if folder is None:
        return None
    trainer.save_checkpoint(path := f"{folder}/last.ckpt", weights_only=False)
    return path


def checkpoint_folders(trainer: Trainer) -> Sequence[Path]:
    """Returns the folders on this machine that a trainer's ModelCheckpoints write to, as far as they are fixed."""
    keepers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    names = dict.fromkeys(str(keeper.dirpath) for keeper in keepers if keeper.dirpath)
    return [Path(name) for name in names if "://" not in name]
