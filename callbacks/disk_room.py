"""Whether there is room for what a run will write."""

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lit_edm.errors import InputError
from lit_edm.files import readable


@dataclass(frozen=True)
class Files:
    """Files that a run is going to write.

    Args:
        what: What they are.
        folder: Where they will be; None of what is kept in memory.
        size: Bytes of all of them.
        note: What else is to be told of them.
        advice: What makes them fewer or smaller.
        replaces: Whether they take the place of files that stand in the folder, or go on from them in a resumed run.
    """

    what: str
    folder: Path | None
    size: int
    note: str = ""
    advice: str = "name another folder"
    replaces: bool = False


@dataclass(frozen=True)
class Room:
    """Bytes that a run needs on a disk, and those that are free; and one of its folders there."""

    folder: Path
    needed: int
    free: int


def check_room(planned: Iterable[Files]) -> list[Room]:
    """Checks that folders can be written to, and that there is room for what is to be in them.

    Returns:
        What is needed on each disk.

    Raises:
        InputError: A folder cannot be written to, or its disk is too full.
    """
    disks: dict[int, dict[Files, Path]] = {}
    for files in planned:
        if files.folder is not None and files.size > 0:  # a cache that holds everything need not be ours to write to
            place = standing(files.folder)
            disks.setdefault(place.stat().st_dev, {})[files] = place
    return [check_disk(on_disk) for on_disk in disks.values()]


def check_disk(places: Mapping[Files, Path]) -> Room:
    """Checks that there is room for files of one disk, given folders on it that are there already."""
    most = max(places, key=lambda files: files.size)
    room = Room(most.folder or places[most], needed(places), shutil.disk_usage(places[most]).free)
    if room.needed > room.free:
        raise InputError(
            f"{room.folder}: this run needs about {readable(room.needed)} on its disk, most of it for {most.what}, and "
            f"{readable(room.free)} are free: free some, or {most.advice}"
        )
    return room


def needed(planned: Iterable[Files]) -> int:
    """Returns the bytes that are to be free for files; what some of them replace in a folder is counted once."""
    added, replacing = 0, dict[Path, int]()
    for files in planned:
        if files.replaces and files.folder is not None:
            replacing[files.folder] = replacing.get(files.folder, 0) + files.size
        else:
            added += files.size
    return added + sum(max(0, size - held(folder)) for folder, size in replacing.items())


def standing(folder: Path) -> Path:
    """Returns a folder, or the nearest one above it that is there.

    Raises:
        InputError: Something else stands in its place, or it cannot be written to.
    """
    above = folder.absolute(), *folder.absolute().parents
    nearest = next(path for path in above if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        raise InputError(f"{nearest} is a file, where this run is to have a folder, {folder}: move it, or name another")
    if not os.access(nearest, os.W_OK):
        raise InputError(f"{nearest} cannot be written to, where this run is to have {folder}: name another folder")
    return nearest


def held(folder: Path) -> int:
    """Returns the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
