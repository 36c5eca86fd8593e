"""Prodigy with one estimate for each parameter group, learning rate schedules, and what rates amount to."""

from collections.abc import Callable
from math import cos, inf, pi
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import ParamsT

from lit_edm.errors import InputError

if TYPE_CHECKING:
    from prodigyopt import Prodigy

__all__ = ["GroupedProdigy", "WarmupSchedule", "effective_rates", "rate_warning"]

LARGE_RATES = ("SGD", "Adadelta", "LBFGS")
"""Parts of names of optimizers that do not scale gradients as Adam does: rates of 0.1 to 1 are usual with them."""


class GroupedProdigy(Optimizer):
    """Prodigy (Mishchenko and Defazio 2023) that estimates the step size d of every parameter group by itself.

    Each group is stepped by a prodigyopt.Prodigy that knows this group alone, and so has its own d, lr, betas and
    weight decay; prodigyopt takes one d and one lr for all. What a group gives under a key of the arguments below,
    0.0 included, stands in place of the argument. A group whose lr is 0.0 is not stepped: no movement, no decay, the
    same d. Nor is a parameter without a gradient, which has no share in d either.

    Args:
        params: Parameters, or dicts of parameter groups.
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
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["lr"] > 0:
                self._prodigy_of(group).step()
        return loss

    def _prodigy_of(self, group: dict[str, Any]) -> "Prodigy":
        """Lends a group, and the state of its parameters, to a Prodigy, which keeps nothing elsewhere.

        So there is nothing to keep in step with schedules, checkpoints and copies: all of it is in this optimizer.
        """
        from prodigyopt import Prodigy

        prodigy = Prodigy([{"params": []}])
        prodigy.param_groups, prodigy.state = [group], self.state
        return prodigy


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


class WarmupSchedule(LambdaLR):
    """Learning rates that grow linearly from 0, and then stay or fall: the schedules of diffusers' scripts.

    torch's own classes each do one half of this, and a chain of two is hard to write in YAML.

    Args:
        optimizer: Whose learning rates are scheduled.
        warmup_steps: Optimizer steps of growth, >= 0.
        decay: What comes then: constant; or down to final over the rest of total_steps: linear; cosine, half a wave;
            polynomial, a power of what linear is.
        total_steps: Optimizer steps in all, above warmup_steps; only constant can do without.
        cycles: Times that cosine falls, each from the full rate, >= 1.
        power: The power of polynomial, > 0.
        final: Share of the rate that is left in the end, in [0, 1].

    Raises:
        InputError: An argument is out of its range, or total_steps is missing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        decay: Literal["constant", "linear", "cosine", "polynomial"] = "constant",
        total_steps: int | None = None,
        cycles: int = 1,
        power: float = 1.0,
        final: float = 0.0,
    ) -> None:
        if decay != "constant" and (total_steps is None or total_steps <= warmup_steps):
            raise InputError(
                f"WarmupSchedule.total_steps is {total_steps}; {decay} needs the run's optimizer steps, more than "
                f"warmup_steps, which are {warmup_steps}"
            )
        if warmup_steps < 0 or cycles < 1 or not power > 0 or not 0 <= final <= 1:
            raise InputError(
                f"WarmupSchedule: {warmup_steps=}, {cycles=}, {power=}, {final=}; steps must be 0 or more, cycles 1 or "
                "more, power positive, final in [0, 1]"
            )

        def factor(step: int) -> float:
            if step < warmup_steps:
                return step / warmup_steps
            if decay == "constant" or total_steps is None:
                return 1.0
            done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
            wave = 1.0 if done >= 1 else (cycles * done) % 1.0
            left = {"linear": 1 - done, "cosine": (1 + cos(pi * wave)) / 2, "polynomial": (1 - done) ** power}
            return final + (1 - final) * left[decay]

        super().__init__(optimizer, factor)


def effective_rates(optimizer: Optimizer) -> dict[str, float]:
    """Returns the learning rate of each parameter group by its name; d times lr where the group has an estimate d."""
    return {
        group.get("name", f"group_{index}"): float(group.get("d", 1.0) * group["lr"])
        for index, group in enumerate(optimizer.param_groups)
    }


def rate_warning(optimizer: Optimizer) -> str | None:
    """Returns a line on the first learning rate that is far from what is usual with its optimizer, if there is one.

    Optimizers such as Prodigy multiply the rate that they find by lr, which 1.0 leaves as it is; Adam and its like
    want some 1e-4. A rate given to one and meant for the other trains nothing, or breaks everything.
    """
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        rate = group.get("initial_lr", group["lr"])
        if "d" in group and rate and not 0.1 <= rate <= 10:
            return f"{rate_key(optimizer, group)} is {rate:g}, a factor on the rate that {kind} finds; 1.0 is usual"
        if "d" not in group and rate >= 0.1 and not any(name in kind for name in LARGE_RATES):
            return f"{rate_key(optimizer, group)} is {rate:g}, which is very large for {kind}; 1e-4 is usual"
    return None


def rate_key(optimizer: Optimizer, group: dict[str, Any]) -> str:
    """Returns the key of the config that the learning rate of a group comes from."""
    rate, name = group.get("initial_lr", group["lr"]), group.get("name")
    if name in ("embeddings", "text_encoders") and rate != optimizer.defaults["lr"]:
        return f"model.init_args.{name}_lr"
    return "model.init_args.optimizer.init_args.lr"
