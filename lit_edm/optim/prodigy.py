"""Prodigy with one estimate for each parameter group, in a few kernels and without a wait for the device."""

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lit_edm.errors import InputError
from lit_edm.optim.flat import FlatState
from lit_edm.optim.group_step import step_group


class GroupedProdigy(Optimizer):
    """Prodigy (Mishchenko and Defazio 2023) that estimates the step size d of every parameter group by itself.

    Each group does what a prodigyopt.Prodigy that knows this group alone would do, and so has its own d, lr, betas and
    weight decay; prodigyopt takes one d and one lr for all. What a group gives under a key of the arguments below,
    0.0 included, stands in place of the argument. A group whose lr is 0.0 is not stepped: no movement, no decay, the
    same d. Nor is a parameter without a gradient, which has no share in d either.

    A step is a few dozen kernels, however many parameters a group has, and never waits for the device: d and what it
    follows from are tensors, (), from the first step on. The state of each parameter has prodigyopt's form, and goes
    on in either; only that p0 of a parameter of zeros is kept too, for to see that it is zeros would be to wait.
    Parameters may be in shards (DTensor). Half precision is stepped in single.

    Args:
        params: Parameters, or dicts of parameter groups, each on one device.
        lr: Factor on what is estimated, >= 0.
        betas: Decay of the running mean and of the running square of the gradient, each in [0, 1).
        beta3: Decay of the running sums behind d, in [0, 1); the root of the second beta if not given.
        eps: Added to the root of the running square, in units of d; > 0.
        weight_decay: Strength of the weight decay, >= 0.
        decouple: Decay as AdamW does; by the gradient, as Adam does, if not.
        use_bias_correction: Adam's correction of the first steps.
        safeguard_warmup: Keep the lr out of the estimate of d, for schedules that begin with a warm-up.
        d0: First value of d, > 0; seldom changed.
        d_coef: Factor on the estimate of d, > 0: the way to tune it, between 0.5 and 2.
        growth_rate: Most that d grows by in a step, >= 1, which warms up below some 1.02.
        slice_p: Estimate d from each p-th entry of a parameter, >= 1, in less memory.

    Raises:
        InputError: An argument, or what a group gives in its place, is out of its range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = inf,
        slice_p: int = 1,
    ) -> None:
        arguments = {
            "lr": lr,
            "betas": betas,
            "beta3": beta3,
            "eps": eps,
            "weight_decay": weight_decay,
            "decouple": decouple,
            "use_bias_correction": use_bias_correction,
            "safeguard_warmup": safeguard_warmup,
            "d0": d0,
            "d_coef": d_coef,
            "growth_rate": growth_rate,
            "slice_p": slice_p,
        }
        self._flat: dict[int, FlatState] = {}
        super().__init__(params, {**arguments, "d_numerator": 0.0, "k": 0, "fsdp_in_use": False})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which begins with a d of its own."""
        check_settings({**self.defaults, **param_group})
        d0 = param_group.get("d0", self.defaults["d0"])
        super().add_param_group({"d": d0, "d_max": d0, **param_group})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Steps every group whose lr is not 0.

        Args:
            closure: Evaluates the loss again, and returns it.

        Raises:
            InputError: A group has parameters in shards (DTensor) and whole ones, or shards and a slice_p above 1.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            stepped = [parameter.grad is not None for parameter in group["params"]]
            if group["lr"] > 0 and any(stepped):
                step_group(group, self._flat_state(index).stretches(stepped))
                for parameter, counts in zip(group["params"], stepped, strict=True):
                    if counts:
                        self.state[parameter]["step"] += 1
        return loss

    def _flat_state(self, index: int) -> FlatState:
        """Returns the state of a group, laid out anew where others have replaced it, or moved the parameters."""
        group = self.param_groups[index]
        parameters, with_mean = group["params"], group["betas"][0] > 0
        flat = self._flat.get(index)
        if flat is None or not flat.fits(parameters, self.state, with_mean):
            flat = self._flat[index] = FlatState(parameters, self.state, with_mean, group["slice_p"])
        return flat

    def __getstate__(self) -> dict[str, Any]:
        """Returns what copies begin with: tensors of their own, for pickle would write a whole group for each view."""
        state: dict[str, Any] = super().__getstate__()
        copies = {parameter: {k: copied(v) for k, v in entry.items()} for parameter, entry in self.state.items()}
        return {**state, "state": type(self.state)(self.state.default_factory, copies)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over the state of a copy or of a checkpoint, which the next step lays out."""
        self._flat = {}
        super().__setstate__(state)


def copied(value: Any) -> Any:
    """Returns a copy of a tensor; anything else as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def check_settings(group: dict[str, Any]) -> None:
    """Raises an InputError that names the first setting of a group of GroupedProdigy that is out of its range."""
    rules = {
        "lr": (group["lr"] >= 0, "0 or more"),
        "betas": (all(0 <= beta < 1 for beta in group["betas"]), "two numbers in [0, 1)"),
        "beta3": (0 <= (group["beta3"] or 0) < 1, "in [0, 1)"),
        "eps": (group["eps"] > 0, "positive"),
        "weight_decay": (group["weight_decay"] >= 0, "0 or more"),
        "d0": (group["d0"] > 0, "positive"),
        "d_coef": (group["d_coef"] > 0, "positive"),
        "growth_rate": (group["growth_rate"] >= 1, "1 or more"),
        "slice_p": (group["slice_p"] >= 1, "1 or more"),
    }
    for name, (allowed, rule) in rules.items():
        if not allowed:
            of_group = f" of {group['name']}" if "name" in group else ""
            raise InputError(f"GroupedProdigy.{name}{of_group} is {group[name]}; it must be {rule}")
