"""Updates of layers from and to the factors, by kohya's and LyCORIS' names, that are in files."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_edm.errors import InputError
from lit_edm.sdxl.updates import LayerUpdate, LoKrUpdate, LoRAUpdate, from_factors


def update_of(factors: Mapping[str, Tensor], scale: float | None = None) -> LayerUpdate:
    """Returns the update that has these factors.

    Args:
        factors: Factors by their names, and alpha.
        scale: What the file says of the scale elsewhere; alpha / rank if not given.

    Raises:
        InputError: Factors are missing, do not fit together, or are of a kind that is not known.
    """
    for name, value in factors.items():
        if value.numel() == 0 or (name == "alpha" and value.numel() != 1):
            raise InputError(f"{name} has the shape {tuple(value.shape)}; have it exported again")
        if name not in ("alpha", "dora_scale") and value.ndim < 2:
            raise InputError(f"{name} has the shape {tuple(value.shape)}, which is no matrix; have it exported again")
    scale = scale_of(factors) if scale is None else scale
    if not factors.keys() & {"lora_down.weight", "lora_up.weight"}:
        if "dora_scale" in factors:
            raise InputError("a magnitude (dora_scale) is known of LoRA alone")
        return from_factors(without_core(factors), scale)
    try:
        a, b = factors["lora_down.weight"].float(), factors["lora_up.weight"].float()
    except KeyError as error:
        raise InputError(f"{error} is missing") from error
    if "lora_mid.weight" in factors:
        a = contracted(factors["lora_mid.weight"], a.flatten(1))
    magnitude = factors.get("dora_scale")
    if magnitude is not None and magnitude.numel() != len(b):
        raise InputError(f"its magnitude has the shape {tuple(magnitude.shape)}; one value a row, {len(b)}, is known")
    return LoRAUpdate(a, b, scale, None if magnitude is None else magnitude.float().flatten())


def scale_of(factors: Mapping[str, Tensor]) -> float:
    """Returns alpha / rank; 1 without alpha, or without a rank: alpha means nothing to LoKr of two full matrices."""
    inner = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    ranks = [len(factors[name]) for name in inner if name in factors]
    return factors["alpha"].item() / ranks[0] if "alpha" in factors and ranks else 1.0


def without_core(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the factors of LoHa or LoKr, a core tensor of convolutions (Tucker's decomposition) put into the second.

    With a core (rank, rank, height, width) the factors are (rank, out) and (rank, in).
    """
    plain = {name: value.float() for name, value in factors.items() if name != "alpha"}
    for core, pair in {"hada_t1": "hada_w1", "hada_t2": "hada_w2", "lokr_t2": "lokr_w2"}.items():
        if core in plain and f"{pair}_a" in plain and f"{pair}_b" in plain:
            plain[f"{pair}_a"] = plain[f"{pair}_a"].T
            plain[f"{pair}_b"] = contracted(plain.pop(core), plain[f"{pair}_b"]).flatten(1)
    return plain


def contracted(core: Tensor, factor: Tensor) -> Tensor:
    """Returns the kernels (rank, in, height, width) of a core (rank, r, height, width) after a factor (r, in).

    Raises:
        InputError: They do not fit together.
    """
    if core.ndim != 4 or factor.ndim != 2 or core.shape[1] != len(factor):
        raise InputError(f"factors of shapes {tuple(core.shape)} and {tuple(factor.shape)} do not fit")
    return torch.einsum("rshw,si->rihw", core.float(), factor)


def factors_of(update: LayerUpdate, alpha: float) -> dict[str, Tensor]:
    """Returns an update's factors and its alpha, float32, what the scale is more than alpha / rank in one of them."""
    factors = {name: value.float() for name, value in update.factors().items()}
    full = isinstance(update, LoKrUpdate) and len(update.w1) == len(update.w2) == 1
    name = "lora_up.weight" if isinstance(update, LoRAUpdate) else next(iter(factors))
    factors[name] = factors[name] * (update.scale if full else update.scale * update.rank / alpha)
    return factors | {"alpha": torch.tensor(alpha)}
