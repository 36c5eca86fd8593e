"""Prodigy with one estimate for each parameter group, learning rate schedules, and what rates amount to."""

from lit_edm.optim.prodigy import GroupedProdigy
from lit_edm.optim.rates import effective_rates, rate_warning
from lit_edm.optim.schedules import WarmupSchedule

__all__ = ["GroupedProdigy", "WarmupSchedule", "effective_rates", "rate_warning"]
