# ruff: noqa: D102 (overrides are described by their base class)
"""Where tensors that are costly to make are kept: in memory, or as files."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lit_edm.files import holds_tensors, read_tensors, write_tensors

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
    """

    folder: str

    def get(self, key: str) -> Tensors | None:
        return read_tensors(self.path(key))

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        write_tensors(self.path(key), tensors)

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
