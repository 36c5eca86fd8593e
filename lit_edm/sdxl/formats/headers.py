"""What headers of files say: peft's settings in diffusers', what programs show in kohya's, placeholders in ours."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_edm.errors import InputError
from lit_edm.sdxl.json_object import read_object
from lit_edm.sdxl.updates import AdapterWeights, LayerUpdate, LoHaUpdate, LoKrUpdate, LoRAUpdate

KEY = "lora_adapter_metadata"
"""Under which diffusers has peft's settings in a header, JSON, each after its network's name."""

NAME = r"(?:\.\*)?(?:\w|-|\\?\.)*"
CHOICE = re.compile(rf"\^?(?:\((?:\?:)?{NAME}(?:\|{NAME})*\)|{NAME})\$?")

TOKENS_KEY = "lit_edm_tokens"
"""Under which this package has the number of tokens of each placeholder in a header, JSON."""


@dataclass(frozen=True)
class AdapterMetadata:
    """Settings of peft, such as unet.r; none in files without them.

    Args:
        settings: Settings by network and name.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, header: Mapping[str, str], path: Path) -> "AdapterMetadata":
        """Reads a header.

        Raises:
            InputError: The adapter is the difference to another base than the file is for, or what the header says
                cannot be understood.
        """
        settings = header_object(header, KEY, path)
        for key, value in settings.items():
            start = str(value).partition("_")[0]
            if key.endswith(".init_lora_weights") and start in ("pissa", "olora", "corda", "loftq"):
                raise InputError(
                    f"{path}: its header says that {start} has taken a part out of the base, which the file does not "
                    "hold; have it exported as a LoRA for the base"
                )
            name = key.rpartition(".")[2]
            alphas = {"lora_alpha": {"": value}, "alpha_pattern": value or {}}.get(name, {})
            if not isinstance(alphas, dict) or not all(map(is_alpha, alphas, alphas.values())):
                raise InputError(
                    f"{path}: its header says {key} is {json.dumps(value)[:80]}, which cannot be understood; "
                    "have it exported again"
                )
        return cls(settings)

    def scale(self, network: str, layer: str, rank: int) -> float | None:
        """Returns the scale of a layer's update, or None if nothing is said of it."""
        if f"{network}.lora_alpha" not in self.settings:
            return None
        alpha = self.settings[f"{network}.lora_alpha"]
        for pattern, value in (self.settings.get(f"{network}.alpha_pattern") or {}).items():
            if any(
                re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) for name in (layer, layer.removeprefix("text_model."))
            ):
                alpha = value
        return alpha / (rank**0.5 if self.settings.get(f"{network}.use_rslora") else rank)


def is_alpha(pattern: str, alpha: object) -> bool:
    """Tells whether an alpha is a number and its pattern a choice of names, as peft writes them.

    Any other expression could be one that takes for ever to match.
    """
    return isinstance(alpha, int | float) and abs(alpha) < 1e9 and CHOICE.fullmatch(pattern) is not None


def header_object(header: Mapping[str, str], key: str, path: Path) -> dict[str, Any]:
    """Returns what a header has under a key, a JSON object; empty if there is nothing.

    Raises:
        InputError: It is something else.
    """
    try:
        return read_object(header.get(key, "{}"))
    except ValueError as error:
        raise InputError(f"{path}: its header's {key} cannot be read ({error}); have it exported again") from error


def diffusers_header(networks: Mapping[str, Mapping[str, LoRAUpdate]], rank: int) -> dict[str, str]:
    """Returns the header for updates that all have one rank, which alpha is too.

    So diffusers makes of the header what it makes of the weights alone, and programs that read no header are right.
    """
    settings = {}
    for network, updates in networks.items():
        described = {
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": any(update.magnitude is not None for update in updates.values()),
            "target_modules": [layer.removeprefix("text_model.") for layer in updates],
        }
        settings |= {f"{network}.{name}": value for name, value in described.items()}
    return {KEY: json.dumps(settings, sort_keys=True)} if settings else {}


def kohya_header(weights: AdapterWeights, alpha: float, name: str) -> dict[str, str]:
    """Returns what A1111, Forge, ComfyUI and kohya's scripts show of an adapter, or sort it by."""
    updates = [update for layers in weights.networks.values() for update in layers.values()]
    words = ", ".join(weights.tokens)
    header = {
        "ss_output_name": name,
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "ss_network_dim": str(max((update.rank for update in updates), default=0)),
        "ss_network_alpha": str(alpha),
        **network_module(updates),
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.title": name,
    }
    return header | ({"modelspec.trigger_phrase": words} if words else {}) | tokens_header(weights.tokens)


def network_module(updates: Sequence[LayerUpdate]) -> dict[str, str]:
    """Returns which of the programs around kohya's scripts trains such updates, and by which algorithm."""
    kinds = {type(update) for update in updates}
    with_magnitude = any(isinstance(update, LoRAUpdate) and update.magnitude is not None for update in updates)
    if kinds <= {LoRAUpdate} and not with_magnitude:
        return {"ss_network_module": "networks.lora"}
    algorithm = "loha" if LoHaUpdate in kinds else "lokr" if LoKrUpdate in kinds else "locon"
    arguments = {"algo": algorithm} | ({"dora_wd": "True", "wd_on_out": "True"} if with_magnitude else {})
    return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}


def tokens_header(tokens: Mapping[str, int]) -> dict[str, str]:
    """Returns the header that tells the number of tokens of each placeholder."""
    return {TOKENS_KEY: json.dumps(dict(tokens))} if tokens else {}
