"""Goes on with what has been trained before, by this package or another."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lit_edm.errors import InputError
from lit_edm.sdxl.adapters import Adapter
from lit_edm.sdxl.formats import read_adapter
from lit_edm.sdxl.injection import inject
from lit_edm.sdxl.layers import adapter_key, is_text_encoder, matches, network_name
from lit_edm.sdxl.low_rank import without_updates
from lit_edm.sdxl.updates import AdapterWeights


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
        source = f"{adapter_key(network)}.init_args.path: {self.path}"
        networks, name = read_adapter(Path(self.path).expanduser()).networks, network_name(network)
        if not networks.keys() & ({"text_encoder", "text_encoder_2"} if is_text_encoder(network) else {"unet"}):
            raise InputError(f"{source} has updates of {', '.join(networks) or 'nothing'}, not of {name}; write null")
        updates = networks.get(name, {})
        resting = {layer for layer in updates if any(matches(layer, pattern) for pattern in without)}
        for trainable in (True, False):
            part = {layer: update for layer, update in updates.items() if (layer in resting) != trainable}
            inject(AdapterWeights({name: part}), {name: network}, trainable, source=source)

    def disabled(self, network: nn.Module) -> AbstractContextManager[None]:
        """Leaves out the updates, as long as the context is open."""
        return without_updates(network)


@torch.no_grad()
def start_embeddings(path: str, rows: Mapping[str, nn.Parameter]) -> None:
    """Lets new tokens' embeddings start from those of a file.

    Args:
        path: File or folder with embeddings, apart or bundled with an adapter.
        rows: The embeddings, clip_l (N, D1) and clip_g (N, D2), in place.

    Raises:
        InputError: The file cannot be read, has no embeddings, others than there are tokens, or those of another base.
    """
    found = read_adapter(Path(path).expanduser()).embeddings
    for name, values in rows.items():
        shape = tuple(found[name].shape) if name in found else "missing"
        if shape != tuple(values.shape):
            raise InputError(
                f"model.init_args.embeddings: {path}: {name} is {shape}, but model.init_args.tokens and the base want "
                f"{tuple(values.shape)} (tokens, values of each); name a file of as many tokens and of this base"
            )
        values.copy_(found[name])
