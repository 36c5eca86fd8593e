# ruff: noqa: D102 (overrides are described by their base class)
"""Where tensors that are costly to make are kept: in memory, or as files."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lit_edm.errors import InputError
from lit_edm.files import existing, holds_tensors, read_tensors, write_tensors

__all__ = ["DiskCache", "MemoryCache", "TensorCache", "fingerprint"]

Tensors = dict[str, Tensor]


class TensorCache(ABC):
    """Keeps named tensors under keys that say all they follow from, so that nothing that is kept is ever stale."""

    @abstractmethod
    def get(self, key: str) -> Tensors | None:
        """Returns what is kept under a key, on the CPU, or None."""

    @abstractmethod
    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors under a key."""

    def check(self, key: str) -> None:  # noqa: B027 (a class may leave it out)
        """Finds out whether tensors can be kept, before any are made.

        Args:
            key: Of the config, under which the cache was written.

        Raises:
            InputError: None could be.
        """

    @property
    @abstractmethod
    def is_shared(self) -> bool:
        """Whether all processes of a run see what one of them puts."""

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None


@dataclass(frozen=True)
class MemoryCache(TensorCache):
    """Keeps tensors in memory, for one run and one process; its loaders' workers share them.

    Of SDXL at 1024 px an image takes 0.5 MB, and a caption 0.3 MB in half precision.
    """

    kept: dict[str, Tensors] = field(default_factory=dict, init=False, repr=False, compare=False)

    def get(self, key: str) -> Tensors | None:
        return self.kept.get(key)

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        with torch.inference_mode(False):  # autograd refuses tensors born in there
            self.kept[key] = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}

    @property
    def is_shared(self) -> bool:
        return False


@dataclass(frozen=True)
class DiskCache(TensorCache):
    """Keeps each key's tensors in a safetensors file, for all runs and processes that name the folder.

    A file is there whole or not at all, and one that is damaged afterwards counts as not there. Files of settings that
    are no longer used stay until the folder is deleted.

    Args:
        folder: Where the files are.

    Raises:
        InputError: Something is to be kept, and the folder cannot be written to.
    """

    folder: str

    def get(self, key: str) -> Tensors | None:
        return read_tensors(self.path(key))

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        try:
            write_tensors(self.path(key), tensors)
        except (NotADirectoryError, FileExistsError, PermissionError) as error:
            raise InputError(f"DiskCache.folder: {self.folder} cannot be written to: name another folder") from error

    def check(self, key: str) -> None:
        folder = Path(self.folder).expanduser()
        there = folder if folder.exists() else existing(folder)
        if not there.is_dir():
            raise InputError(f"{key}.init_args.folder: {there} is a file: name a folder")
        if there != folder and not os.access(there, os.W_OK):  # one that is there may hold all that is asked for
            raise InputError(f"{key}.init_args.folder: {there} cannot be written to, to make {folder}: name another")

    def __contains__(self, key: str) -> bool:
        return holds_tensors(self.path(key))

    def path(self, key: str) -> Path:
        """Returns the file of a key; the first letters of its digest are a folder, so that none holds too many."""
        digest = hashlib.sha256(key.encode()).hexdigest()
        return Path(self.folder).expanduser() / digest[:2] / f"{digest}.safetensors"

    @property
    def is_shared(self) -> bool:
        return True


def fingerprint(tensors: Mapping[str, Tensor], settings: str = "") -> str:
    """Returns a digest of named tensors, values and all, and of settings: what a key says of the network behind it."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
