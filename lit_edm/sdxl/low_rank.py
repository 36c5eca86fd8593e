"""What adapters have in common that train low-rank updates of frozen layers, by peft."""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import nn

from lit_edm.edm.validation import check
from lit_edm.errors import InputError
from lit_edm.sdxl.adapters import Adapter, hold_in_float32
from lit_edm.sdxl.layers import adapter_key, chosen, ends_with, is_text_encoder, matches

if TYPE_CHECKING:
    from peft import PeftConfig


class Size(NamedTuple):
    """Of the update of a layer, which is scaled by alpha / rank."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class LowRankAdapter(Adapter):
    """What adapters of peft have in common: which layers they update, and of which rank.

    Layers and blocks are named by patterns: up_blocks.0, *.attn2, or content and style, the two blocks of B-LoRA.

    Args:
        rank: Rank of the updates, at least 1.
        alpha: Updates are scaled by alpha / rank, > 0; the rank if not given.
        target_modules: Ends of the names of the layers to update; those of attention if not given.
        blocks: Patterns that choose among these layers; all of them if empty.
        dropout: Share dropped at random in training, in [0, 1): of the inputs of A in LoRA, DoRA and LoCon, of the
            rows of the update in LoHa and LoKr.
        ranks: Ranks for layers by pattern; of several that match the last counts.
        alphas: Alphas for layers by pattern, > 0; of several that match the last counts.

    Raises:
        InputError: A rank is below 1, an alpha is not positive, or dropout is outside [0, 1).
    """

    rank: int = 8
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    blocks: tuple[str, ...] = ()
    dropout: float = 0.0
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    unet_layers: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    text_layers: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "out_proj")

    def __post_init__(self) -> None:
        check(self, "rank", self.rank >= 1, "1 or more")
        check(self, "ranks", all(rank >= 1 for rank in self.ranks.values()), "1 or more for each pattern")
        check(self, "alpha", self.alpha is None or self.alpha > 0, "positive")
        check(self, "alphas", all(alpha > 0 for alpha in self.alphas.values()), "positive for each pattern")
        check(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")

    @abstractmethod
    def peft_config(self, sizes: Mapping[str, Size]) -> "PeftConfig":
        """Returns peft's description of the updates of the named layers."""

    def __call__(self, network: nn.Module, without: Sequence[str] = ()) -> None:
        """Adds the updates to the network, which computes what it did before.

        Raises:
            InputError: A target or a pattern means no linear layer or convolution.
        """
        from peft import inject_adapter_in_model

        if sizes := self.sizes(network, without):
            inject_adapter_in_model(self.peft_config(sizes), network)
            hold_in_float32(parameter for parameter in network.parameters() if parameter.requires_grad)

    def check(self, network: nn.Module, without: Sequence[str] = ()) -> None:
        """Raises InputError if a target or a pattern means no linear layer or convolution."""
        self.sizes(network, without)

    def disabled(self, network: nn.Module) -> AbstractContextManager[None]:
        """Leaves out the updates, as long as the context is open."""
        return without_updates(network)

    def sizes(self, network: nn.Module, without: Sequence[str] = ()) -> dict[str, Size]:
        """Returns the size of the update of each layer that has one."""
        key = f"{adapter_key(network)}.init_args"
        layers = {n: layer for n, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
        ends = self.target_modules or (self.text_layers if is_text_encoder(network) else self.unet_layers)
        for end in self.target_modules or ():
            if not any(ends_with(name, end) for name in layers):
                raise InputError(f"{key}.target_modules: no linear layer or convolution is called {end}")
        targets = [name for name in layers if any(ends_with(name, end) for end in ends)]
        names = chosen(targets, self.blocks, f"{key}.blocks")
        chosen(names, self.ranks, f"{key}.ranks")
        chosen(names, self.alphas, f"{key}.alphas")
        names = [name for name in names if not any(matches(name, pattern) for pattern in without)]
        return {name: self.size(name, layers[name]) for name in names}

    def size(self, name: str, layer: nn.Module) -> Size:
        """Returns the size of the update of a layer."""
        rank, alpha = self.default_size(layer)
        rank = last_match(self.ranks, name, rank)
        alpha = last_match(self.alphas, name, alpha)
        return Size(rank, rank if alpha is None else alpha)

    def default_size(self, layer: nn.Module) -> tuple[int, float | None]:
        """Returns rank and alpha of layers that no pattern is given for."""
        return self.rank, self.alpha


def updated_layers(network: nn.Module) -> dict[str, Any]:
    """Returns the layers of a network that have updates of peft, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)}


def casts_all_it_trains(network: nn.Module) -> bool:
    """Tells whether a network needs no autocast: layers cast all that it trains to the precision they compute in."""
    casting = [layer for layer in network.modules() if getattr(layer, "casts", False)]
    cast = {id(parameter) for layer in casting for parameter in layer.parameters()}
    return all(id(parameter) in cast for parameter in network.parameters() if parameter.requires_grad)


@contextmanager
def without_updates(network: nn.Module) -> Iterator[None]:
    """Lets a network compute without the updates of its layers, as long as the context is open."""
    layers = [layer for layer in updated_layers(network).values() if not layer.disable_adapters]
    trained = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained:  # which peft has set as it sees fit
            parameter.requires_grad_(requires_grad)


def patterns(sizes: Mapping[str, Size]) -> dict[str, Any]:
    """Returns the layers and their sizes as peft's configs take them."""
    return {
        "target_modules": list(sizes),
        "rank_pattern": by_value({name: size.rank for name, size in sizes.items()}),
        "alpha_pattern": by_value({name: size.alpha for name, size in sizes.items()}),
    }


def by_value(values: Mapping[str, float]) -> dict[str, float]:
    """Returns one pattern of full names a value: with one a name, peft takes half a minute for SDXL."""
    names: dict[float, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(re.escape(name))
    return {f"^(?:{'|'.join(alternatives)})": value for value, alternatives in names.items()}


def last_match(values: Mapping[str, Any], name: str, default: Any) -> Any:
    """Returns the value of the last pattern that matches a name."""
    return [default, *(value for pattern, value in values.items() if matches(name, pattern))][-1]
