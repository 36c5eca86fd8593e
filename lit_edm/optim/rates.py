"""What the learning rates of an optimizer amount to, and whether they go with it."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

LARGE_RATES = ("SGD", "Adadelta", "LBFGS")
"""Parts of names of optimizers that do not scale gradients as Adam does: rates of 0.1 to 1 are usual with them."""


def effective_rates(optimizer: Optimizer) -> dict[str, float | Tensor]:
    """Returns the learning rate of each parameter group by its name; d times lr where the group has an estimate d.

    The latter is a tensor, (), where the optimizer has d on the device, for which this does not wait.
    """
    return {
        group.get("name", f"group_{index}"): group.get("d", 1.0) * group["lr"]
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
