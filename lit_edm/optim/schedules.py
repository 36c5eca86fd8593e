"""Learning rate schedules."""

from math import cos, pi
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_edm.errors import InputError


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
