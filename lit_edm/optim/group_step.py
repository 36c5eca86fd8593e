"""The arithmetic of a step of Prodigy, in which nothing on the device is looked at."""

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from lit_edm.optim.flat import Stretch
from lit_edm.optim.shards import sum_of_shards

ESTIMATE = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k")
"""What a group finds: numbers before its first step, and tensors, (), on its device from then on."""


def step_group(group: dict[str, Any], stretches: list[Stretch]) -> None:
    """Steps parameters of a group, and updates its estimate (Prodigy with Adam's steps).

    Args:
        group: Settings, and the estimate, which is replaced.
        stretches: The parameters.
    """
    room = stretches[0].value
    found = estimate_of(group, room.device)
    d, decay = found["d"], group["weight_decay"] if group["decouple"] else 0.0
    rate = d * group["lr"] * bias_correction(group, found["k"])
    growth = (d if group["safeguard_warmup"] else rate) / group["d0"]
    factor, growth = d.to(room), growth.to(room)  # once, and not in every kernel
    sums = torch.stack([learn(stretch, group, factor, growth) for stretch in stretches]).to(d.dtype).sum(0)
    towards, size = sum_of_shards(sums, group["params"], group["fsdp_in_use"])
    new, progress = next_estimate(group, found, towards * rate / group["d0"], size)
    group.update(new)
    rate = torch.where(progress, rate, 0.0)
    factor, speed, kept = new["d"].to(room), -rate.to(room), (1 - decay * rate).to(room)
    for stretch in stretches:
        put_direction(stretch, group, factor).mul_(speed)
        stretch.move(kept if decay else None)


def estimate_of(group: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Returns what a group has found so far, (), in double precision where the device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64

    def there(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(device, dtype)
        return torch.full((), value, dtype=dtype, device=device)  # a kernel: to copy a number would be to wait

    return {name: there(group.get(name, 0.0)) for name in ESTIMATE}


def bias_correction(group: dict[str, Any], steps: Tensor) -> Tensor | float:
    """Returns Adam's factor on the rate after so many steps, ()."""
    if not group["use_bias_correction"]:
        return 1.0
    beta1, beta2 = group["betas"]
    return (1 - beta2 ** (steps + 1)).sqrt() / (1 - beta1 ** (steps + 1))


def beta3_of(group: dict[str, Any]) -> float:
    """Returns the decay of the running sums."""
    return sqrt(group["betas"][1]) if group["beta3"] is None else group["beta3"]


def scaled_gradient(stretch: Stretch, group: dict[str, Any], d: Tensor) -> Tensor:
    """Returns d times the gradient, with the decay that is not decoupled, (n,); the values are in stretch.value."""
    stretch.gather()
    if group["weight_decay"] and not group["decouple"]:
        stretch.gradient.add_(stretch.value, alpha=group["weight_decay"])
    return stretch.gradient.mul_(d)


def learn(stretch: Stretch, group: dict[str, Any], d: Tensor, growth: Tensor) -> Tensor:
    """Updates running means and sums.

    Args:
        stretch: Parameters.
        group: Settings.
        d: The estimate so far, ().
        growth: The weight of d g in the running sums, ().

    Returns:
        The sums over d g (p0 - p) and over |s|, (2,).
    """
    gradient, long, slice_p = scaled_gradient(stretch, group, d), stretch.long, group["slice_p"]
    beta1, beta2 = group["betas"]
    if beta1 > 0:
        long["exp_avg"].lerp_(gradient, 1 - beta1)
    long["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    sliced, distance = gradient[::slice_p], stretch.value[::slice_p]
    long["s"].mul_(beta3_of(group)).addcmul_(sliced, growth)
    towards = torch.sub(long["p0"], distance, out=distance).mul_(sliced).sum()
    return torch.stack([towards, torch.abs(long["s"], out=distance).sum()])


def next_estimate(
    group: dict[str, Any], found: dict[str, Tensor], towards: Tensor, size: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns what a group finds in a step, and whether it finds anything.

    It does not as long as no gradient was other than 0, and then makes no step.

    Args:
        group: Settings.
        found: What it has found before.
        towards: What the step adds to the numerator of d, ().
        size: The denominator, ().
    """
    d, numerator = found["d"], beta3_of(group) * found["d_numerator"] + towards
    d_hat = group["d_coef"] * numerator / size
    d_max = torch.maximum(found["d_max"], d_hat)
    grown = torch.where(d == group["d0"], torch.maximum(d, d_hat), d) * group["growth_rate"]
    new = {"d": torch.minimum(d_max, grown), "d_max": d_max, "d_hat": d_hat, "d_numerator": numerator}
    new |= {"d_denom": size, "k": found["k"] + 1}
    progress = size != 0
    return {name: torch.where(progress, value, found[name]) for name, value in new.items()}, progress


def put_direction(stretch: Stretch, group: dict[str, Any], d: Tensor) -> Tensor:
    """Returns Adam's direction, (n,), which is in stretch.value: the running mean, or the gradient where there is none.

    Args:
        stretch: Parameters.
        group: Settings.
        d: The estimate after this step's gradients, ().
    """
    mean = stretch.long.get("exp_avg")
    if mean is None:
        mean = scaled_gradient(stretch, group, d)  # once more: others have worked in the room since
    root = torch.sqrt(stretch.long["exp_avg_sq"], out=stretch.value).add_(group["eps"] * d)
    return torch.div(mean, root, out=stretch.value)
