"""What Prodigy keeps of many parameters, laid out in a few long tensors that one kernel goes through."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lit_edm.optim.shards import check_shards, local, part_of, sharded_like

KINDS = ("exp_avg", "exp_avg_sq", "s", "p0")
"""What is kept of a parameter, by prodigyopt's names."""

SLICED = ("s", "p0")
"""Of these there is one value for every slice_p of a parameter."""

State = MutableMapping[Tensor, dict[str, Any]]
"""What an optimizer keeps, by parameter."""


def most_at_once(device: torch.device) -> int:
    """Returns how many values to step at once, of which two copies are room to work in.

    On a CPU as many as its cache holds, and elsewhere as many as keep any device busy.
    """
    return 2**18 if device.type == "cpu" else 2**24


@dataclass(frozen=True)
class Stretch:
    """Neighbours in the long tensors, which are stepped at once: n values in all, every slice_p-th of which are m.

    Args:
        parameters: Each with a gradient.
        gradients: Views of gradient in the parameters' shapes.
        values: Views of value, likewise.
        gradient: Room to work in, (n,); what is in it between steps is of no matter.
        value: More of it, (n,).
        long: The parts of the long tensors: (n,) of exp_avg and exp_avg_sq, (m,) of s and p0.
    """

    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    values: list[Tensor]
    gradient: Tensor
    value: Tensor
    long: dict[str, Tensor]

    def gather(self) -> None:
        """Copies the parameters and their gradients into the room to work in."""
        torch._foreach_copy_(self.gradients, [local(p.grad) for p in self.parameters if p.grad is not None])
        torch._foreach_copy_(self.values, [local(parameter) for parameter in self.parameters])

    def move(self, kept: Tensor | None) -> None:
        """Adds what is in `value` to the parameters, of each of which a share, (), is kept if it is given."""
        parameters = [local(parameter) for parameter in self.parameters]
        if kept is not None:
            torch._foreach_mul_(parameters, kept)
        torch._foreach_add_(parameters, self.values)


class FlatState:
    """The state of a group's parameters, one after another in a long tensor for each kind of it.

    What an optimizer keeps of a parameter are views of these, in prodigyopt's form, so that checkpoints are as ever.
    Whatever takes the place of a view, such as what a checkpoint had, is noticed, and laid out anew.

    Args:
        parameters: Of a group, on one device; all of them in shards (DTensor), or none.
        state: The optimizer's; what it has of the parameters moves here.
        with_mean: Whether the running mean of gradients is kept.
        slice_p: Of how many values of a parameter s and p0 have one.

    Raises:
        InputError: Some parameters are in shards and others are not, or shards would be sliced.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], state: State, with_mean: bool, slice_p: int) -> None:
        check_shards(parameters, slice_p)
        self.parameters = parameters
        self.state = state
        self.slice_p = slice_p
        self.layout = layout_of(parameters, with_mean)
        self.dtype = reduce(torch.promote_types, (parameter.dtype for parameter in parameters), torch.float32)
        # Each parameter begins at a multiple of slice_p: slices of the long tensor are those of all parameters.
        counts = (-(-local(parameter).numel() // slice_p) for parameter in parameters)
        self.places = list(pairwise(accumulate(counts, initial=0)))
        self.long: dict[str, Tensor] = {}
        for name in KINDS if with_mean else KINDS[1:]:  # one by one, each of which frees what was in its place
            self._lay_out(name)
        self._seen = [state.get(parameter, {}).get("exp_avg_sq") for parameter in parameters]
        self._stepped: list[bool] = []
        self._stretches: list[Stretch] = []

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self.dtype, device=self.parameters[0].device)

    def _lay_out(self, name: str) -> None:
        self.long[name] = self._zeros(self.places[-1][1] * self._values_per_slice(name))
        for index, parameter in enumerate(self.parameters):
            if entry := self.state.get(parameter):
                view = self._view(name, index)
                if name in entry:
                    part = part_of(entry[name], view)  # a lone 0 is prodigyopt's p0 of a parameter of zeros
                    local(view).copy_(part if part.dim() == 0 else part.reshape(local(view).shape))
                entry[name] = view

    def _values_per_slice(self, name: str) -> int:
        return 1 if name in SLICED else self.slice_p

    def _view(self, name: str, index: int) -> Tensor:
        """Returns a parameter's part of a long tensor, in the shape that prodigyopt gives it, or in that of shards."""
        parameter, (first, end) = self.parameters[index], self.places[index]
        own = local(parameter)
        if name in SLICED and own is parameter:
            return self.long[name][first:end]
        part = self.long[name][first * self._values_per_slice(name) :][: own.numel()]
        return sharded_like(part.view(own.shape), parameter)

    def fits(self, parameters: Sequence[nn.Parameter], state: State, with_mean: bool) -> bool:
        """Tells whether the optimizer still has these parameters and these views."""
        if state is not self.state or self.layout != layout_of(parameters, with_mean):
            return False
        kept = (state.get(parameter, {}).get("exp_avg_sq") for parameter in parameters)
        return all(view is seen for view, seen in zip(kept, self._seen, strict=True))

    def stretches(self, stepped: list[bool]) -> list[Stretch]:
        """Returns what to step, given which parameters are stepped, one at least; those that are new begin now."""
        if stepped != self._stepped:
            for index, here in enumerate(stepped):
                if here and self._seen[index] is None:
                    self._begin(index)
            self._stretches, self._stepped = self._cut(stepped), stepped
        return self._stretches

    def _cut(self, stepped: list[bool]) -> list[Stretch]:
        sizes = [(end - first) * self.slice_p for first, end in self.places]
        runs = runs_of(stepped, sizes, most_at_once(self.parameters[0].device))
        longest = max(sum(sizes[index] for index in run) for run in runs)
        gradient, value = self._zeros(longest), self._zeros(longest)
        return [self._stretch(run, gradient, value) for run in runs]

    def _begin(self, index: int) -> None:
        parameter = self.parameters[index]
        views = {name: self._view(name, index) for name in self.long}
        local(views["p0"]).view(-1).copy_(local(parameter).flatten()[:: self.slice_p])
        self.state[parameter] = {"step": 0, **views}
        self._seen[index] = views["exp_avg_sq"]

    def _stretch(self, run: range, gradient: Tensor, value: Tensor) -> Stretch:
        first, end = self.places[run[0]][0], self.places[run[-1]][1]
        parameters = [self.parameters[index] for index in run]
        gradient, value = (room[: (end - first) * self.slice_p] for room in (gradient, value))
        places = [((self.places[i][0] - first) * self.slice_p, local(self.parameters[i])) for i in run]
        gradients, values = (
            [room[start:][: own.numel()].view(own.shape) for start, own in places] for room in (gradient, value)
        )
        long = {}
        for name, tensor in self.long.items():
            each = self._values_per_slice(name)
            long[name] = tensor[first * each : end * each]
        return Stretch(parameters, gradients, values, gradient, value, long)


def layout_of(parameters: Sequence[nn.Parameter], with_mean: bool) -> tuple[Any, ...]:
    """Returns what a change of which makes another layout necessary."""
    return len(parameters), parameters[0].device, parameters[0].dtype, with_mean


def runs_of(stepped: Sequence[bool], sizes: Sequence[int], limit: int) -> list[range]:
    """Returns the numbers of those that are stepped, in runs of neighbours whose sizes add up to the limit at most."""
    runs: list[range] = []
    size = 0
    for index in (index for index, here in enumerate(stepped) if here):
        size += sizes[index]
        if runs and runs[-1].stop == index and size <= limit:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
            size = sizes[index]
    return runs
