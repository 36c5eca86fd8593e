"""Goes on with what has been trained before, by this package or another."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_edm.errors import InputError
from lit_edm.sdxl.adapters import Adapter
from lit_edm.sdxl.formats import read_adapter
from lit_edm.sdxl.injection import fitting, inject
from lit_edm.sdxl.layers import adapter_key, is_text_encoder, matches, network_name
from lit_edm.sdxl.low_rank import without_updates
from lit_edm.sdxl.updates import AdapterWeights, LayerUpdate


@dataclass(frozen=True)
class FromFile(Adapter):
    """Trains on the updates of a file, of the kinds, layers, ranks and scales that they have there.

    A checkpoint holds what has been trained since; resuming from one reads the file again first.

    Args:
        path: File or folder of an adapter, of diffusers, kohya or LyCORIS; one that has the network.
    """

    path: str

    def __call__(self, network: nn.Module, without: Sequence[str] = ()) -> None:
        """Puts the updates on the network; those of layers to leave as they are, too, but they are not trained.

        Raises:
            InputError: The file cannot be read, has no updates of the network, or is for another base.
        """
        name, updates = network_name(network), self.updates_of(network)
        resting = {layer for layer in updates if any(matches(layer, pattern) for pattern in without)}
        for trainable in (True, False):
            part = {layer: update for layer, update in updates.items() if (layer in resting) != trainable}
            inject(AdapterWeights({name: part}), {name: network}, trainable, source=self.source(network))

    def check(self, network: nn.Module, without: Sequence[str] = ()) -> None:
        """Raises InputError if the file cannot be read, has no updates of the network, or is for another base."""
        fitting(self.updates_of(network), network, self.source(network))

    def source(self, network: nn.Module) -> str:
        """Returns what messages call the file: its key in the config, and its path."""
        return f"{adapter_key(network)}.init_args.path: {self.path}"

    def updates_of(self, network: nn.Module) -> Mapping[str, LayerUpdate]:
        """Reads the updates of a network, by its layers' published names; none if all are the other text encoder's.

        Raises:
            InputError: The file cannot be read, or has no updates of such a network.
        """
        networks = read(self.path, f"{adapter_key(network)}.init_args.path").networks
        if not networks.keys() & ({"text_encoder", "text_encoder_2"} if is_text_encoder(network) else {"unet"}):
            raise InputError(
                f"{self.source(network)} has updates of {', '.join(networks) or 'nothing'}, not of "
                f"{network_name(network)}; write null"
            )
        return networks.get(network_name(network), {})

    def disabled(self, network: nn.Module) -> AbstractContextManager[None]:
        """Leaves out the updates, as long as the context is open."""
        return without_updates(network)


def read(path: str, key: str) -> AdapterWeights:
    """Reads an adapter; an InputError names the key of the config that names the file."""
    try:
        return read_adapter(Path(path).expanduser())
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


@torch.no_grad()
def start_embeddings(path: str, rows: Mapping[str, nn.Parameter]) -> None:
    """Lets new tokens' embeddings start from those of a file.

    Args:
        path: File or folder with embeddings, apart or bundled with an adapter.
        rows: The embeddings, clip_l (N, D1) and clip_g (N, D2), in place.

    Raises:
        InputError: The file cannot be read, has no embeddings, others than there are tokens, or those of another base.
    """
    found = read_embeddings(path, {name: tuple(values.shape) for name, values in rows.items()})
    for name, values in rows.items():
        values.copy_(found[name])


def read_embeddings(path: str, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
    """Reads embeddings of the shapes, (N, D1) and (N, D2), that clip_l and clip_g are to have; see start_embeddings."""
    found = read(path, "model.init_args.embeddings").embeddings
    for name, wanted in shapes.items():
        shape = tuple(found[name].shape) if name in found else "missing"
        if shape != wanted:
            raise InputError(
                f"model.init_args.embeddings: {path}: {name} is {shape}, but model.init_args.tokens and the base want "
                f"{wanted} (tokens, values of each); name a file of as many tokens and of this base"
            )
    return found
