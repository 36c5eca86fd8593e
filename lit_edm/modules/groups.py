"""The groups of parameters that are trained, and which of them rest for now."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class ParameterGroups:
    """Named groups of trained parameters. Phases of training let some of them rest: those are left as they are.

    Args:
        groups: Parameters of each group; empty ones are left out.
    """

    def __init__(self, groups: Mapping[str, list[nn.Parameter]]) -> None:
        self.parameters = {name: parameters for name, parameters in groups.items() if parameters}
        self._resting: set[str] = set()

    def set_trained(self, name: str, trained: bool) -> None:
        """Lets a group rest, or learn on."""
        (self._resting.discard if trained else self._resting.add)(name)

    def wake(self) -> None:
        """Lets all groups learn, as at the beginning of a run."""
        self._resting.clear()

    def learn(self, *names: str) -> bool:
        """Tells whether any of the named groups learns now."""
        return any(name in self.parameters and name not in self._resting for name in names)

    def for_optimizer(self, settings: Mapping[str, Mapping[str, float | None]]) -> list[dict[str, Any]]:
        """Returns the groups as optimizers take them, each with those of its settings that are given (0.0 is)."""
        return [
            {"name": name, "params": parameters, **{key: v for key, v in settings[name].items() if v is not None}}
            for name, parameters in self.parameters.items()
        ]

    def nothing_of_resting(self) -> Tensor | float:
        """Returns 0, a function of every resting parameter where there are several processes.

        DDP expects each parameter to have a part in each loss, or has to look for those that have none. FSDP does not.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0.0
        resting = (p for name in self._resting for p in self.parameters.get(name, ()) if not isinstance(p, DTensor))
        return sum((0 * parameter.sum() for parameter in resting), start=0.0)
