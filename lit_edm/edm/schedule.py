"""Noise level as a function of a network's time: SDXL's table, and the VP and iDDPM columns of Table 1."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_edm.edm.validation import check

BetaSchedule = Literal["scaled_linear", "linear"]


@dataclass(frozen=True)
class TimestepSchedule:
    """The noise levels sigma_t = sqrt((1 - abar_t) / abar_t) of a network trained on discrete timesteps; default SDXL.

    Args:
        num_timesteps: Timesteps T the network was trained with, at least 2.
        beta_start: First beta, in (0, 1).
        beta_end: Last beta, in [beta_start, 1).
        beta_schedule: Whether sqrt(beta) ("scaled_linear") or beta ("linear") grows linearly with t.
        zero_terminal_snr: Whether the betas are rescaled to no signal at the last timestep (Lin et al. 2023). As in
            diffusers' Euler scheduler the last abar becomes 2^-24 and not 0, so that the last sigma is finite.
    """

    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        check(self, "num_timesteps", self.num_timesteps >= 2, "at least 2")
        check(self, "beta_start", 0 < self.beta_start < 1, "in (0, 1)")
        check(self, "beta_end", self.beta_start <= self.beta_end < 1, f"in [beta_start, 1) = [{self.beta_start}, 1)")
        check(self, "beta_schedule", self.beta_schedule in get_args(BetaSchedule), f"one of {get_args(BetaSchedule)}")

    def sigmas(self, device: torch.device | str | None = None) -> Tensor:
        """Returns the noise level of every timestep, increasing, shape (T,), float32; shared, not to be written to."""
        return _sigma_table(self, torch.device(device or "cpu"))

    @property
    def sigma_min(self) -> float:
        """Noise level of the first timestep."""
        return self.sigmas()[0].item()

    @property
    def sigma_max(self) -> float:
        """Noise level of the last timestep."""
        return self.sigmas()[-1].item()

    def timestep(self, sigma: Tensor) -> Tensor:
        """Maps sigma (B,) to timesteps (B,): linear in ln(sigma) between entries, exact at them, then constant."""
        sigmas = self.sigmas(sigma.device).to(sigma.dtype)
        index = torch.searchsorted(sigmas, sigma.contiguous(), right=True).sub(1).clamp(0, self.num_timesteps - 2)
        low, high = sigmas[index], sigmas[index + 1]
        fraction = torch.log1p((sigma - low) / low) / torch.log1p((high - low) / low)
        return (index + fraction).clamp(0, self.num_timesteps - 1)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Maps timesteps (B,), clipped to [0, T - 1], to noise levels (B,): the inverse of `timestep`."""
        sigmas = self.sigmas(timestep.device)
        timestep = timestep.clamp(0, self.num_timesteps - 1)
        index = timestep.long().clamp(max=self.num_timesteps - 2)
        return sigmas[index] ** (1 - (timestep - index)) * sigmas[index + 1] ** (timestep - index)


# The tables are kept on their device: no training step copies from the host. Made outside of inference mode, where a
# validation run may ask for them first: autograd refuses tensors born in there.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _sigma_table(schedule: TimestepSchedule, device: torch.device) -> Tensor:
    """Returns sigma_t, computed in float64, as float32 on the device, shape (T,)."""
    power = 0.5 if schedule.beta_schedule == "scaled_linear" else 1.0
    ends = schedule.beta_start**power, schedule.beta_end**power
    betas = torch.linspace(*ends, schedule.num_timesteps, dtype=torch.float64, device="cpu") ** (1 / power)
    alpha_bar = (1 - betas).cumprod(0)
    if schedule.zero_terminal_snr:
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alpha_bar[-1] = 2.0**-24
    return ((1 - alpha_bar) / alpha_bar).sqrt().to(device, torch.float32)


def vp_sigma(t: Tensor, beta_d: float, beta_min: float) -> Tensor:
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1), the schedule of the VP column."""
    return torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()


def vp_time(sigma: Tensor, beta_d: float, beta_min: float) -> Tensor:
    """sigma^-1, the inverse of `vp_sigma`, in a form that does not cancel at small sigma."""
    exponent = torch.log1p(sigma**2)
    return 2 * exponent / ((beta_min**2 + 2 * beta_d * exponent).sqrt() + beta_min)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def iddpm_sigmas(num_timesteps: int, c1: float, c2: float, device: torch.device) -> Tensor:
    """Returns u_0 > ... > u_{M-1} of the iDDPM column (u_M = 0 left out), shape (M,), float32; not to be written to."""
    alpha_bar = [math.sin(math.pi / 2 * j / (num_timesteps * (c2 + 1))) ** 2 for j in range(num_timesteps + 1)]
    u = [0.0]
    for j in range(num_timesteps, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], c1) - 1))
    return torch.tensor(u[:0:-1], dtype=torch.float32, device=device)
