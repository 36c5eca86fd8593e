"""Merging adapters: one update of each layer from those of several, and the new tokens of all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_edm.edm.validation import check
from lit_edm.errors import InputError
from lit_edm.sdxl.merge_layer import WeightedSum, as_matrices, merged, padded, zero_like
from lit_edm.sdxl.merge_tokens import joined_embeddings, joined_placeholders
from lit_edm.sdxl.updates import AdapterWeights, LayerUpdate, LoRAUpdate

Method = Literal[
    "cat",
    "linear",
    "svd",
    "magnitude_prune",
    "magnitude_prune_svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
]
"""What peft calls the ways to merge."""


@dataclass(frozen=True)
class Merge:
    """Merges adapters by peft's add_weighted_adapter, layer by layer.

    With weights w_i and updates s_i B_i A_i, zero in a layer that an adapter does not update:

    - cat is their weighted sum, exactly; ranks add up.
    - svd is the sum's best approximation of a given rank.
    - linear adds factors, sqrt(w_i s_i) A_i and sqrt(w_i s_i) B_i, and so keeps the rank, but multiplies the B of one
      adapter with the A of another, too: a rough approximation. Lower ranks are padded with zeros.
    - magnitude_prune keeps the largest entries of each adapter, dare_linear random ones, which it scales up (DARE, Yu
      et al., 2024), and adds them. ties (Yadav et al., 2023) keeps the largest, dare_ties random ones, elects a sign
      for each entry, and averages those that have it. All four do so with the factors, as linear does; with _svd, with
      the updates themselves, as the papers say, and keep the best approximation of a given rank.

    Args:
        method: The way to merge.
        density: Share of the entries that pruning keeps, in (0, 1].
        majority_sign: How entries elect their sign: by their sum (total) or by their number (frequency).
        rank: Rank of the result of svd and of methods that end in _svd; the adapters' largest if not given.
        seed: Seed of what DARE drops.
        device: Where the work is done: cpu, or cuda, for an svd of all of SDXL takes minutes on a CPU.

    Raises:
        InputError: A setting is out of range, or rank is given to a method that takes none.
    """

    method: Method = "cat"
    density: float = 0.5
    majority_sign: Literal["total", "frequency"] = "total"
    rank: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        check(self, "method", self.method in get_args(Method), f"one of {', '.join(get_args(Method))}")
        check(self, "density", 0 < self.density <= 1, "in (0, 1]")
        check(self, "rank", self.rank is None or self.rank >= 1, "1 or more")
        check(self, "rank", self.rank is None or self.by_svd, "left out, for svd and methods with _svd alone take it")

    @property
    def by_svd(self) -> bool:
        """Whether updates themselves are merged, not their factors, and the result has a rank to choose."""
        return self.method.endswith("svd")

    def __call__(self, adapters: Mapping[str, AdapterWeights], weights: Sequence[float]) -> AdapterWeights:
        """Returns one adapter, LoRA, with the new tokens of all, numbered through in the order of the adapters.

        Args:
            adapters: What to merge, by the names of their files.
            weights: One for each adapter; negative ones subtract it.

        Raises:
            InputError: The adapters are of different bases, or of kinds or ranks that the method cannot merge.
        """
        rank = self.rank or self.largest_rank(adapters)
        networks: dict[str, dict[str, LayerUpdate]] = {}
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for network, name, parts in shared_layers(adapters, weights):
                for path, (_, update) in parts.items():
                    self.check_kind(path, f"{network}.{name}", update)
                shape = weight_shape(name, [update for _, update in parts.values()])
                a, b = self.merged_factors(f"{network}.{name}", parts, rank)
                update = LoRAUpdate(a.reshape(-1, *shape), b.reshape(*b.shape, *(1 for _ in shape[1:])))
                networks.setdefault(network, {})[name] = update
        return AdapterWeights(networks, joined_embeddings(adapters), joined_placeholders(adapters))

    def largest_rank(self, adapters: Mapping[str, AdapterWeights]) -> int:
        """Returns the largest rank of a LoRA.

        Raises:
            InputError: There is none, and the method needs a rank.
        """
        updates = [u for adapter in adapters.values() for layers in adapter.networks.values() for u in layers.values()]
        rank = max((update.rank for update in updates if isinstance(update, LoRAUpdate)), default=0)
        if self.by_svd and updates and not rank:
            raise InputError(f"{', '.join(adapters)}: none is a LoRA whose rank the result could have; give Merge.rank")
        return rank

    def check_kind(self, path: str, layer: str, update: LayerUpdate) -> None:
        """Raises an InputError unless the method can merge an update of this kind."""
        if isinstance(update, LoRAUpdate) and update.magnitude is not None:
            raise InputError(
                f"{path}: {layer} is DoRA, whose update depends on the base's weights; "
                "give the base and the method cat, which adds all to it"
            )
        if not isinstance(update, LoRAUpdate) and not self.by_svd:
            kind = type(update).__name__.removesuffix("Update")
            raise InputError(
                f"{path}: {layer} is {kind}, which has no factors as LoRA has; merge by svd or a method with _svd, "
                "or give the base and the method cat, which adds all to it"
            )

    def merged_factors(
        self, layer: str, parts: Mapping[str, tuple[float, LayerUpdate]], rank: int
    ) -> tuple[Tensor, Tensor]:
        """Returns A and B, matrices, of the merged update of one layer.

        Raises:
            InputError: Factors that would be pruned differ in rank, so that their entries have no counterparts.
        """
        weights = [weight for weight, _ in parts.values()]
        updates = [as_matrices(update) for _, update in parts.values()]
        ranks = {path: update.rank for path, (_, update) in parts.items()}
        if not self.by_svd and self.method != "cat":
            if len({*ranks.values()}) > 1 and self.method != "linear":
                sizes = ", ".join(f"{rank} in {path}" for path, rank in ranks.items())
                raise InputError(f"{layer} has ranks {sizes}, which {self.method} cannot mix; use {self.method}_svd")
            updates = [padded(update, max(ranks.values())) for update in updates]
        if len(updates) == 1 and self.method != "cat":  # with which peft would merge linearly, whatever the method
            weights, updates = [*weights, 0.0], [*updates, zero_like(updates[0])]
        return merged(
            updates,
            weights,
            self.device,
            combination_type=self.method,
            svd_rank=min(rank, *updates[0].size),
            density=self.density,
            majority_sign_method=self.majority_sign,
        )


def summed(adapters: Mapping[str, AdapterWeights], weights: Sequence[float]) -> AdapterWeights:
    """Returns the weighted sum of adapters of any kinds, which only a base can hold, and the new tokens of all.

    Raises:
        InputError: The adapters are of different bases.
    """
    networks: dict[str, dict[str, LayerUpdate]] = {}
    for network, name, parts in shared_layers(adapters, weights):
        networks.setdefault(network, {})[name] = WeightedSum(tuple(parts.values()))
    return AdapterWeights(networks, joined_embeddings(adapters), joined_placeholders(adapters))


def shared_layers(
    adapters: Mapping[str, AdapterWeights], weights: Sequence[float]
) -> Iterator[tuple[str, str, dict[str, tuple[float, LayerUpdate]]]]:
    """Yields network and name of each layer that an adapter updates, with the weights and updates of those that do.

    Raises:
        InputError: A layer has not the same size in all of them, or there is not one weight for each adapter.
    """
    if len(adapters) != len(weights):
        raise InputError(f"there are {len(adapters)} adapters, but {len(weights)} weights; give one for each")
    names = {(net, name): None for a in adapters.values() for net, layers in a.networks.items() for name in layers}
    for network, name in names:
        found = [
            (path, w, a.networks.get(network, {}).get(name))
            for (path, a), w in zip(adapters.items(), weights, strict=True)
        ]
        parts = {path: (weight, update) for path, weight, update in found if update is not None}
        (first, size), *others = ((path, update.size) for path, (_, update) in parts.items())
        for path, other in others:
            if other != size:
                raise InputError(
                    f"{path}: {network}.{name} is {other[0]} x {other[1]}, but {size[0]} x {size[1]} in {first}; "
                    "only adapters of one base can be merged"
                )
        yield network, name, parts


def weight_shape(name: str, updates: Sequence[LayerUpdate]) -> tuple[int, ...]:
    """Returns (in,) or (in, height, width) of a layer's weight: some files hold all updates as matrices.

    SDXL's convolutions are 3 x 3, but for those beside the residual blocks, conv_shortcut.
    """
    for update in updates:
        if isinstance(update, LoRAUpdate):
            return tuple(update.a.shape[1:])
    columns, last = updates[0].size[1], name.rsplit(".", 1)[-1]
    if not last.startswith("conv"):
        return (columns,)
    side = 1 if last == "conv_shortcut" else 3
    return columns // side**2, side, side
