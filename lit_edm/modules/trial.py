"""Tries an optimizer and a schedule before weights are loaded, so that a wrong setting is told in seconds."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from lit_edm.errors import InputError
from lit_edm.modules.groups import ParameterGroups


def try_optimizer(
    optimizer: OptimizerCallable | None,
    lr_scheduler: LRSchedulerCallable | None,
    groups: Sequence[str],
    settings: Mapping[str, Mapping[str, float | None]],
) -> None:
    """Makes an optimizer and a schedule of groups of a single number each.

    Args:
        optimizer: Creates the optimizer; nothing is tried if not given.
        lr_scheduler: Creates the schedule; none if not given.
        groups: Names of what is trained.
        settings: Of each group, those that are given.

    Raises:
        InputError: A setting is refused, or prodigyopt's Prodigy is given several learning rates: it estimates one.
    """
    if optimizer is None:
        return
    stand_ins = ParameterGroups({name: [nn.Parameter(torch.zeros(1))] for name in groups})
    with refusals_under("model.init_args.optimizer"):
        made = optimizer(stand_ins.for_optimizer(settings))
    rates = {group["lr"] for group in made.param_groups}
    if type(made).__module__.startswith("prodigyopt") and len(rates) > 1:
        raise InputError(
            f"model.init_args: learning rates {sorted(rates)} are given, but prodigyopt.Prodigy takes one for all; "
            "write GroupedProdigy in its place, which has one of each group"
        )
    if lr_scheduler is not None:
        with refusals_under("model.init_args.lr_scheduler"):
            lr_scheduler(made)


@contextmanager
def refusals_under(key: str) -> Iterator[None]:
    """Raises InputError in place of what torch raises of an argument that is out of its range."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{key}: {error}") from error
