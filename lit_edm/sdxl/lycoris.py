"""The adapters of LyCORIS (Yeh et al., 2023) whose updates are other products than W + s B A."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_edm.edm.validation import check
from lit_edm.sdxl.low_rank import LowRankAdapter, Size, patterns

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class LoHa(LowRankAdapter):
    """Trains updates W + (alpha / rank) (B1 A1) * (B2 A2), by element: of rank^2 at most (Hyeon-Woo et al., 2022)."""

    def peft_config(self, sizes: Mapping[str, Size]) -> "PeftConfig":
        """Returns peft's description of the updates of the named layers."""
        from peft import LoHaConfig

        return LoHaConfig(rank_dropout=self.dropout, **patterns(sizes))


@dataclass(frozen=True)
class LoKr(LowRankAdapter):
    """Trains Kronecker products W + (alpha / rank) C x (B A), B A one full matrix where that is less.

    Args:
        factor: Size that C is to have, as far as it divides W's; -1 takes what is nearest to its square root.
    """

    factor: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "factor", self.factor == -1 or self.factor >= 1, "1 or more, or -1")

    def peft_config(self, sizes: Mapping[str, Size]) -> "PeftConfig":
        """Returns peft's description of the updates of the named layers."""
        from peft import LoKrConfig

        return LoKrConfig(
            rank_dropout=self.dropout, rank_dropout_scale=True, decompose_factor=self.factor, **patterns(sizes)
        )
