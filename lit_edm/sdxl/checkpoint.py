"""An SDXL-shaped checkpoint in diffusers' layout: what its configs say of it, and its parts."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_edm.edm import (
    EDMLoss,
    EDMPreconditioning,
    EDMWeighting,
    EpsPreconditioning,
    LogNormal,
    Preconditioning,
    SNRWeighting,
    TimestepSchedule,
    UniformTimesteps,
    VelocityPreconditioning,
)
from lit_edm.errors import InputError
from lit_edm.sdxl.json_object import read_object
from lit_edm.sdxl.parts import check_part, load_part

if TYPE_CHECKING:  # imported where they are needed, so that `lit-edm --help` does not wait for them
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

KEY, VAE_KEY = "model.init_args.pretrained", "model.init_args.vae"
"""What messages call the settings that name a checkpoint and another VAE."""


@dataclass(frozen=True)
class SDXLCheckpoint:
    """A base model, as a folder or on the Hub. Nothing is read before a method asks for it.

    Args:
        pretrained: Folder or Hub name with the sub-folders unet, vae, text_encoder, text_encoder_2, tokenizer,
            tokenizer_2 and scheduler.
        vae: Folder or Hub name of another VAE.
        variant: Weights' file variant, such as fp16.
        revision: Branch, tag or commit on the Hub.
    """

    pretrained: str
    vae: str | None = None
    variant: str | None = None
    revision: str | None = None

    def preconditioning(self) -> Preconditioning:
        """Reads from the scheduler's config what the UNet predicts: epsilon, v, or EDM's F (Playground v2.5).

        Raises:
            InputError: The config names a prediction or beta schedule that is none of these.
        """
        config = self.scheduler_config()
        prediction = config.get("prediction_type", "epsilon")
        if is_edm_native(config):
            if prediction != "epsilon":  # as diffusers' EDM schedulers call c_out = +s sd / sqrt(s^2 + sd^2)
                raise self._unsupported("prediction_type", prediction, "epsilon for an EDM scheduler")
            return EDMPreconditioning(sigma_data=self._number(config, "sigma_data", 0.5))
        match prediction:
            case "epsilon":
                return EpsPreconditioning(self._schedule(config))
            case "v_prediction":
                return VelocityPreconditioning(self._schedule(config))
            case _:
                raise self._unsupported("prediction_type", prediction, "epsilon or v_prediction")

    def sigma_range(self) -> tuple[float, float]:
        """Returns the smallest and the largest noise level that the UNet was trained for."""
        config = self.scheduler_config()
        if is_edm_native(config):
            return self._number(config, "sigma_min", 0.002), self._number(config, "sigma_max", 80.0)
        schedule = self._schedule(config)
        return schedule.sigma_min, schedule.sigma_max

    def pretraining_loss(self) -> EDMLoss:
        """Returns what the base was trained with: plain eps-MSE or v-MSE at uniform timesteps, or EDM's own."""
        match self.preconditioning():
            case EDMPreconditioning(sigma_data):
                return EDMLoss(LogNormal(), EDMWeighting(sigma_data))
            case VelocityPreconditioning(schedule):
                return EDMLoss(UniformTimesteps(schedule), EDMWeighting(1.0))
            case EpsPreconditioning(schedule):
                return EDMLoss(UniformTimesteps(schedule), SNRWeighting())
        raise AssertionError("preconditioning returns one of these three")

    def scheduler_config(self) -> dict[str, Any]:
        """Returns scheduler/scheduler_config.json."""
        return self._config(self.pretrained, "scheduler/scheduler_config.json")

    def vae_config(self) -> dict[str, Any]:
        """Returns config.json of the VAE in use."""
        return self.base_vae_config() if self.vae is None else self._config(self.vae, "config.json", key="vae")

    def base_vae_config(self) -> dict[str, Any]:
        """Returns vae/config.json of the base, also where another VAE is in use."""
        return self._config(self.pretrained, "vae/config.json")

    def text_layers(self) -> tuple[int, int]:
        """Returns the number of layers of each text encoder."""
        configs = (self._config(self.pretrained, f"text_encoder{n}/config.json") for n in ("", "_2"))
        first, second = (config.get("num_hidden_layers") for config in configs)
        if not isinstance(first, int) or not isinstance(second, int):
            raise InputError(
                f"{KEY}: the configs of the text encoders of {self.pretrained} do not say num_hidden_layers; name a "
                "base with two CLIP text encoders"
            )
        return first, second

    def zeros_for_empty_prompt(self) -> bool:
        """Whether guidance contrasts with zeros (SDXL and Playground), or with the embedding of an empty prompt."""
        return self._config(self.pretrained, "model_index.json").get("force_zeros_for_empty_prompt", True)

    def load_tokenizers(self) -> "tuple[CLIPTokenizer, CLIPTokenizer]":
        """Loads both tokenizers."""
        from transformers import CLIPTokenizer

        first, second = (
            load_part(KEY, self.pretrained, part, CLIPTokenizer.from_pretrained, revision=self.revision)
            for part in ("tokenizer", "tokenizer_2")
        )
        return first, second

    def load_text_encoders(self, dtype: torch.dtype) -> "tuple[CLIPTextModel, CLIPTextModelWithProjection]":
        """Loads both text encoders, frozen, in the given precision."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        first = self._network("text_encoder", CLIPTextModel, dtype)
        return first, self._network("text_encoder_2", CLIPTextModelWithProjection, dtype)

    def load_unet(self, dtype: torch.dtype) -> "UNet2DConditionModel":
        """Loads the UNet, frozen, in the given precision."""
        from diffusers import UNet2DConditionModel

        return self._network("unet", UNet2DConditionModel, dtype)

    def load_vae(self, dtype: torch.dtype) -> "AutoencoderKL":
        """Loads the VAE in use, frozen, in the given precision."""
        from diffusers import AutoencoderKL

        if self.vae is None:
            return self._network("vae", AutoencoderKL, dtype)
        settings = {"torch_dtype": dtype, "use_safetensors": True}
        return load_part(VAE_KEY, self.vae, "", AutoencoderKL.from_pretrained, **settings).requires_grad_(False)

    def load_scheduler(self) -> Any:
        """Makes the scheduler that the base names, which has to be one of diffusers'."""
        import diffusers

        config = self.scheduler_config()
        kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
        if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
            raise self._unsupported("_class_name", config.get("_class_name"), "a scheduler of diffusers")
        return kind.from_config(config)  # type: ignore[attr-defined] (it has two bases)

    def check_files(self) -> None:
        """Raises InputError if a part lacks its files, as far as that is known without asking the Hub."""
        source = (KEY, self.pretrained, "vae", self.variant) if self.vae is None else (VAE_KEY, self.vae, "", None)
        check_part(*source)
        for part in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "unet"):
            check_part(KEY, self.pretrained, part, self.variant)

    def _network(self, part: str, kind: Any, dtype: torch.dtype) -> Any:
        settings = {"revision": self.revision, "variant": self.variant, "torch_dtype": dtype, "use_safetensors": True}
        return load_part(KEY, self.pretrained, part, kind.from_pretrained, **settings).requires_grad_(False)

    def _config(self, source: str, name: str, key: str = "pretrained") -> dict[str, Any]:
        from huggingface_hub import hf_hub_download

        revision = self.revision if source == self.pretrained else None
        try:
            local = Path(source).is_dir()
            path = Path(source, name) if local else Path(hf_hub_download(source, name, revision=revision))
            return read_object(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            hint = f" ({error})" if isinstance(error, ValueError) else ""
            if Path(source).is_file():
                hint = ", a single file (from_single_file and save_pretrained of diffusers make a folder of it)"
            elif not Path(source).exists():
                hint = " (no such folder, nor is it on the Hub or in its cache)"
            raise InputError(
                f"model.init_args.{key}: cannot read {name} of {source}{hint}; "
                "name a folder or a Hub repository in diffusers' layout"
            ) from error

    def _schedule(self, config: dict[str, Any]) -> TimestepSchedule:
        if config.get("trained_betas") is not None:
            raise self._unsupported("trained_betas", "a list", "beta_start and beta_end")
        if (schedule := config.get("beta_schedule", "linear")) not in ("scaled_linear", "linear"):
            raise self._unsupported("beta_schedule", schedule, "scaled_linear or linear")
        return TimestepSchedule(
            num_timesteps=int(self._number(config, "num_train_timesteps", 1000)),
            beta_start=self._number(config, "beta_start", 0.0001),
            beta_end=self._number(config, "beta_end", 0.02),
            beta_schedule=schedule,
            zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
        )

    def _number(self, config: dict[str, Any], key: str, otherwise: float) -> float:
        if not isinstance(value := config.get(key, otherwise), int | float):
            raise self._unsupported(key, value, "a number there")
        return value

    def _unsupported(self, key: str, value: object, wanted: str) -> InputError:
        return InputError(
            f"{self.pretrained}/scheduler/scheduler_config.json: {key} is {value}, which is not supported; "
            f"choose a base with {wanted}"
        )


def is_edm_native(scheduler_config: dict[str, Any]) -> bool:
    """Tells from its scheduler's config whether a base was trained with EDM's preconditioning, as Playground v2.5."""
    return str(scheduler_config.get("_class_name")).startswith("EDM")
