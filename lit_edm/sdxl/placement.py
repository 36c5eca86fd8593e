"""Where frozen weights are: networks that a run is done with for now leave the device to those that train."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

Result = TypeVar("Result")


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


@contextmanager
def alone(function: Callable[..., Result], others: Iterable[nn.Module]) -> Iterator[Callable[..., Result]]:
    """Lends a function that has the device to itself, apart from what is trained.

    The frozen weights of others leave the device when it is first called, if it is, and are back at the end.

    Args:
        function: What needs room.
        others: Networks that it does without, or that it fetches itself for a while; see at_hand.
    """
    homes: dict[nn.Module, torch.device] = {}

    def with_room(*args: Any) -> Result:
        if not homes:
            homes.update({module: parameter.device for module in others for parameter in islice(frozen(module), 1)})
            for module in homes:
                place_frozen(module, "cpu")
        return function(*args)

    try:
        yield with_room
    finally:
        for module, home in homes.items():
            place_frozen(module, home)


def frozen(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yields the parameters that are not trained."""
    return (parameter for parameter in module.parameters() if not parameter.requires_grad)
