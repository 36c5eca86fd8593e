# ruff: noqa: D102 (overrides are described by their base class)
"""Any scheduler of diffusers as a sampler."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_edm.edm import Denoise, EDMPreconditioning, Sampler
from lit_edm.edm.validation import check, check_positive
from lit_edm.errors import InputError
from lit_edm.sdxl.checkpoint import SDXLCheckpoint, is_edm_native


@dataclass(frozen=True)
class DiffusersSampler(Sampler):
    """Runs a scheduler of diffusers, from the same noise to the same picture as StableDiffusionXLPipeline.

    It has the config of the base's own scheduler but for what is set here, as Scheduler.from_config in diffusers. The
    noise levels are that config's too, whatever range the sampler is called with.

    Args:
        scheduler: Class of the scheduler, by its name in diffusers or by its import path.
        num_steps: Steps N, of one evaluation each with most schedulers.
        settings: Of the scheduler's constructor, such as {use_karras_sigmas: true}.
        eta: Amount of new noise of DDIM and its relatives, in [0, 1]; other schedulers take no notice.
        base: The base; that of the module if not given.

    Raises:
        InputError: A number is out of range.
    """

    scheduler: str = "EulerDiscreteScheduler"
    num_steps: int = 50
    settings: dict[str, Any] = field(default_factory=dict)
    eta: float = 0.0
    base: SDXLCheckpoint | None = None

    def __post_init__(self) -> None:
        check_positive(self, "num_steps")
        check(self, "eta", 0 <= self.eta <= 1, "in [0, 1]")

    def __call__(
        self,
        denoise: Denoise,
        noise: Tensor,
        sigma_min: float,
        sigma_max: float,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Returns samples (B, C, H, W); several generators are one for each."""
        scheduler, preconditioning = self.make_scheduler(), self._base().preconditioning()
        scheduler.set_timesteps(self.num_steps, device=noise.device)
        arguments = step_arguments(scheduler, eta=self.eta, generator=generator)
        sigmas = level(preconditioning, scheduler.timesteps.to(noise))
        sample = noise * scheduler.init_noise_sigma
        for timestep, sigma, *scalings in zip(scheduler.timesteps, sigmas, *preconditioning(sigmas), strict=True):
            # Eq. 7 of Karras et al. (2022) read from right to left: a scheduler sees what the network says, F
            c_skip, c_out, c_in, _ = scalings
            x = scheduler.scale_model_input(sample, timestep) / c_in
            output = (denoise(x, sigma.expand(len(x))) - c_skip * x) / c_out
            sample = scheduler.step(output, timestep, sample, return_dict=False, **arguments)[0]
        return sample

    @property
    def evaluations(self) -> int:
        scheduler = self.make_scheduler()
        scheduler.set_timesteps(self.num_steps)
        return len(scheduler.timesteps)

    def make_scheduler(self) -> Any:
        """Returns the scheduler.

        Raises:
            InputError: There is no such class, it knows no such setting, or it is for another kind of base.
        """
        scheduler_class, config = self._find_class(), self._base().scheduler_config()
        known = inspect.signature(scheduler_class.__init__).parameters
        native = is_edm_native(config)
        if "prediction_type" not in known or is_edm_native({"_class_name": scheduler_class.__name__}) != native:
            raise InputError(
                f"DiffusersSampler.scheduler: {self.scheduler} is not for "
                f"{'an EDM-native base' if native else 'a base with timesteps'}; choose another"
            )
        if unknown := sorted(self.settings.keys() - known.keys()):
            raise InputError(
                f"DiffusersSampler.settings: {self.scheduler} has no {unknown[0]}; it has {', '.join(list(known)[1:])}"
            )
        try:
            return scheduler_class.from_config(config, **self.settings)
        except (ValueError, NotImplementedError, ImportError) as error:  # what diffusers raises for settings it refuses
            raise InputError(f"DiffusersSampler.settings: {self.scheduler} says: {error}") from error

    def _find_class(self) -> Any:
        from importlib import import_module

        module, _, name = self.scheduler.rpartition(".")
        try:
            return getattr(import_module(module or "diffusers"), name)
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"DiffusersSampler.scheduler: there is no {self.scheduler}; "
                "write a name that diffusers has, such as EulerAncestralDiscreteScheduler, or an import path"
            ) from error

    def _base(self) -> SDXLCheckpoint:
        if self.base is None:
            raise InputError("DiffusersSampler.base is not given: name the base whose noise schedule it is to follow")
        return self.base


def for_base(sampler: Sampler, base: SDXLCheckpoint) -> Sampler:
    """Returns the sampler, with the base where it needs one and has none."""
    if isinstance(sampler, DiffusersSampler) and sampler.base is None:
        return replace(sampler, base=base)
    return sampler


def level(preconditioning: Any, c_noise: Tensor) -> Tensor:
    """Returns the noise levels (N,) that the preconditioning of a base calls c_noise (N,)."""
    if isinstance(preconditioning, EDMPreconditioning):
        return (4 * c_noise).exp()
    return preconditioning.schedule.sigma(c_noise)


def step_arguments(scheduler: Any, **arguments: Any) -> dict[str, Any]:
    """Returns those of the arguments that the scheduler's step takes."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in arguments.items() if name in known}
