"""What an adapter adds to a base, apart from the networks that it is put on and from the files that it is read from.

`formats` reads files into these structures and writes them; `injection` takes them from networks and puts them on.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lit_edm.errors import InputError

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
"""The networks of a pipeline that an adapter can update, by their names there."""


class LayerUpdate(ABC):
    """Of the weight of one linear layer (out, in) or convolution (out, in, height, width)."""

    scale: float

    @property
    @abstractmethod
    def rank(self) -> int:
        """The rank r of the factors."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """The weight's size as a matrix, (out, in) or (out, in * height * width)."""

    @abstractmethod
    def product(self) -> Tensor:
        """Returns the scaled product of the factors as a matrix, float32; see size."""

    def factors(self) -> dict[str, Tensor]:
        """Returns the factors by the names that kohya and LyCORIS have for them.

        Raises:
            InputError: The update has none, so that it can be merged into a base, but not written on its own.
        """
        raise InputError(f"{type(self).__name__} is no update that a file can hold; merge it into a base")

    def delta(self, weight: Tensor) -> Tensor:
        """Returns what is added to the base's weight, of its shape, float32."""
        return self.product().reshape(weight.shape)

    @staticmethod
    def check(fits: bool, *factors: Tensor) -> None:
        """Raises InputError if the shapes of factors do not fit together."""
        if not fits:
            raise InputError(
                f"factors of shapes {', '.join(str(tuple(factor.shape)) for factor in factors)} do not fit"
            )


@dataclass(frozen=True)
class LoRAUpdate(LayerUpdate):
    """s B A (Hu et al., 2021), or with a magnitude m (W + s B A) / |W + s B A| - W, norms by rows (DoRA, Liu et al.).

    Args:
        a: A, (rank, in), or (rank, in, height, width).
        b: B, (out, rank), or (out, rank, 1, 1).
        scale: s.
        magnitude: m, (out,).
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        self.check(self.b[0].numel() == len(self.a), self.a, self.b)
        if self.magnitude is not None:
            self.check(self.magnitude.shape == (len(self.b),), self.b, self.magnitude)

    @property
    def rank(self) -> int:
        """The rank of A and B."""
        return len(self.a)

    @property
    def size(self) -> tuple[int, int]:
        """The weight's size as a matrix."""
        return len(self.b), self.a[0].numel()

    def product(self) -> Tensor:
        """Returns s B A."""
        return self.scale * self.b.float().flatten(1) @ self.a.float().flatten(1)

    def delta(self, weight: Tensor) -> Tensor:
        """Returns what is added to the base's weight, which m needs to know."""
        if self.magnitude is None:
            return super().delta(weight)
        base = weight.float().flatten(1)
        updated = base + self.product()
        factor = self.magnitude.float().reshape(-1, 1) / updated.norm(dim=1, keepdim=True)
        return (factor * updated - base).reshape(weight.shape)

    def factors(self) -> dict[str, Tensor]:
        """Returns the factors by kohya's names: lora_down.weight, lora_up.weight, and dora_scale (out, 1)."""
        magnitude = {} if self.magnitude is None else {"dora_scale": self.magnitude[:, None]}
        return {"lora_down.weight": self.a, "lora_up.weight": self.b} | magnitude


@dataclass(frozen=True)
class LoHaUpdate(LayerUpdate):
    """s (W1a W1b) * (W2a W2b), by element (Hyeon-Woo et al., 2022).

    Args:
        w1_a: W1a, (out, rank).
        w1_b: W1b, (rank, in * height * width).
        w2_a: W2a, (out, rank).
        w2_b: W2b, (rank, in * height * width).
        scale: s.
    """

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        for a, b in ((self.w1_a, self.w1_b), (self.w2_a, self.w2_b)):
            self.check(a.shape[1] == len(b) and (len(a), b.shape[1]) == self.size, a, b)

    @property
    def rank(self) -> int:
        """The rank of either product."""
        return len(self.w1_b)

    @property
    def size(self) -> tuple[int, int]:
        """The weight's size as a matrix."""
        return len(self.w1_a), self.w1_b.shape[1]

    def product(self) -> Tensor:
        """Returns the product by element."""
        return self.scale * matrix((self.w1_a, self.w1_b)) * matrix((self.w2_a, self.w2_b))

    def factors(self) -> dict[str, Tensor]:
        """Returns the factors by LyCORIS' names, such as hada_w1_a."""
        return {f"hada_{name}": getattr(self, name) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}


@dataclass(frozen=True)
class LoKrUpdate(LayerUpdate):
    """s W1 x W2, the Kronecker product of two matrices, either of them full or a product (LyCORIS, Yeh et al., 2023).

    Args:
        w1: W1, or its factors (rows, rank) and (rank, columns).
        w2: W2, (rows, columns) or (rows, columns, height, width), or its factors (rows, rank) and
            (rank, columns * height * width).
        scale: s.
    """

    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        for first, *others in (self.w1, self.w2):
            self.check(all(first.shape[1] == len(other) for other in others), first, *others)

    @property
    def rank(self) -> int:
        """The rank of the factors, or where both matrices are full the most that theirs can be."""
        ranks = [len(factors[1]) for factors in (self.w1, self.w2) if len(factors) > 1]
        return ranks[0] if ranks else max(*self.w1[0].shape, *self.w2[0].shape[:2])

    @property
    def size(self) -> tuple[int, int]:
        """The weight's size as a matrix."""
        return len(self.w1[0]) * len(self.w2[0]), self.w1[-1][0].numel() * self.w2[-1][0].numel()

    def product(self) -> Tensor:
        """Returns the Kronecker product."""
        return self.scale * torch.kron(matrix(self.w1), matrix(self.w2))

    def factors(self) -> dict[str, Tensor]:
        """Returns the factors by LyCORIS' names, such as lokr_w1."""
        named = {"lokr_w1": self.w1, "lokr_w2": self.w2}
        return {
            f"{name}{suffix}": factor
            for name, factors in named.items()
            for suffix, factor in zip(("_a", "_b") if len(factors) > 1 else ("",), factors, strict=True)
        }


def matrix(factors: tuple[Tensor, ...]) -> Tensor:
    """Returns a full matrix or the product of its two factors, float32, kernels of convolutions as columns."""
    first, *others = (factor.float().flatten(1) for factor in factors)
    return first @ others[0] if others else first


def from_factors(factors: Mapping[str, Tensor], scale: float) -> LoHaUpdate | LoKrUpdate:
    """Returns the update that has these factors, by LyCORIS' names.

    Raises:
        InputError: Factors are missing, or do not fit together.
    """
    try:
        if "hada_w1_a" in factors:
            first, second = ((factors[f"hada_w{n}_a"], factors[f"hada_w{n}_b"]) for n in (1, 2))
            return LoHaUpdate(*first, *second, scale)
        w1, w2 = (
            (factors[name],) if name in factors else (factors[f"{name}_a"], factors[f"{name}_b"])
            for name in ("lokr_w1", "lokr_w2")
        )
    except KeyError as error:
        raise InputError(f"{error} is missing") from error
    return LoKrUpdate(w1, w2, scale)


@dataclass(frozen=True)
class AdapterWeights:
    """All that an adapter adds to a base.

    Args:
        networks: Updates by the networks' names in a pipeline (unet, text_encoder, text_encoder_2), and by the layers'
            published names: those of files, where the first text encoder's begin with text_model., too.
        embeddings: New tokens' embeddings: clip_l (N, D1) of the first text encoder and clip_g (N, D2) of the second,
            or nothing.
        tokens: Number of rows of the embeddings for each placeholder, in order; empty if it is not known.
        metadata: What the file's header says besides.
    """

    networks: Mapping[str, Mapping[str, LayerUpdate]]
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def of_kind(self, kind: type[LayerUpdate] | tuple[type[LayerUpdate], ...]) -> "AdapterWeights":
        """Returns the same with the updates of one kind alone, without the networks that have none."""
        chosen = {n: {k: u for k, u in layers.items() if isinstance(u, kind)} for n, layers in self.networks.items()}
        return replace(self, networks={name: layers for name, layers in chosen.items() if layers})
