"""Where frozen weights are: networks that a run is done with for now leave the device to those that train."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def place_frozen(module: nn.Module, device: torch.device | str) -> None:
    """Moves the frozen weights to a device, in place.

    What is trained stays, for optimizers and averages are with it; and so do buffers, which are small, and which DDP
    expects on the device at every step.
    """
    with torch.inference_mode(False):  # autograd refuses weights born in there, where a validation may ask for them
        for parameter in frozen(module):
            parameter.data = parameter.data.to(device)


@contextmanager
def at_hand(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Has the frozen weights on a device for a while, and sends them back to where they were."""
    home = next((parameter.device for parameter in frozen(module)), device)
    if home == device:
        yield
        return
    place_frozen(module, device)
    try:
        yield
    finally:
        place_frozen(module, home)


def frozen(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters that are not trained."""
    return (parameter for parameter in module.parameters() if not parameter.requires_grad)
