"""Checks of a part's fields, so that a wrong setting fails when it is read and not after an epoch."""

from math import inf
from typing import Any

from lit_edm.errors import InputError


def check(part: Any, name: str, allowed: bool, rule: str) -> None:
    """Raises an InputError that names the field, its value and what is allowed, unless it is allowed."""
    if not allowed:
        raise InputError(f"{type(part).__name__}.{name} must be {rule}, got {getattr(part, name)!r}")


def check_positive(part: Any, *names: str) -> None:
    """Raises unless every named field is positive and finite."""
    for name in names:
        check(part, name, 0 < getattr(part, name) < inf, "positive and finite")


def check_sigma_range(part: Any) -> None:
    """Raises unless 0 <= sigma_min < sigma_max."""
    check(part, "sigma_min", 0 <= part.sigma_min < inf, "finite and not negative")
    check(part, "sigma_max", part.sigma_max > part.sigma_min, f"above sigma_min = {part.sigma_min}")
