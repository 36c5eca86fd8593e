"""LoRA and its relatives: updates W + s B A."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from lit_edm.edm.validation import check
from lit_edm.sdxl.layers import adapter_key
from lit_edm.sdxl.low_rank import LowRankAdapter, Size, updated_layers
from lit_edm.sdxl.starts import FROM_WEIGHT, Start, check_start, start_from

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class LoRA(LowRankAdapter):
    """Trains low-rank updates W + (alpha / rank) B A of some layers (Hu et al., 2021).

    Args:
        rank_stabilized: Scale by alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski, 2023).
        init: Where A and B start: default (A uniform, B = 0), gaussian (A normal, B = 0), orthogonal (B A = 0, neither
            is), or from a part of W that is taken out of W: its largest singular vectors (pissa; pissa_niter_4 finds
            them faster, nearly) or its QR decomposition (olora).
    """

    rank_stabilized: bool = False
    init: Start = "default"

    has_magnitude: ClassVar[bool] = False

    def peft_config(self, sizes: Mapping[str, Size]) -> "PeftConfig":
        """Returns peft's description of the updates of the named layers."""
        from lit_edm.sdxl.lora_layers import lora_config  # which imports peft

        return lora_config(
            sizes,
            lora_dropout=self.dropout,
            use_rslora=self.rank_stabilized,
            use_dora=self.has_magnitude,
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
        )

    def __call__(self, network: nn.Module, without: Sequence[str] = ()) -> None:
        """Adds the updates to the network, which computes what it did before.

        Raises:
            InputError: A target or a pattern means no linear layer or convolution, or a layer cannot start so.
        """
        self.check(network, without)
        super().__call__(network, without)
        for layer in updated_layers(network).values():
            start_from(self.init, layer)

    def check(self, network: nn.Module, without: Sequence[str] = ()) -> None:
        """Raises InputError if a target or a pattern means no layer, or a layer cannot start so."""
        for name, size in self.sizes(network, without).items():
            layer = network.get_submodule(name)
            check_start(self.init, name, layer, size.rank, f"{adapter_key(network)}.init_args")


@dataclass(frozen=True)
class DoRA(LoRA):
    """Trains direction and magnitude, m (W + s B A) / |W + s B A| by rows (Liu et al., 2024).

    Args:
        init: Where A and B start: default (A uniform, B = 0), gaussian (A normal, B = 0) or orthogonal (B A = 0,
            neither is).

    Raises:
        InputError: init would take a part out of W, whose norm is where m starts.
    """

    has_magnitude: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "init", self.init not in FROM_WEIGHT, "default, gaussian or orthogonal")

    def __call__(self, network: nn.Module, without: Sequence[str] = ()) -> None:
        """Adds the updates to the network, which computes what it did before.

        Raises:
            InputError: A target or a pattern means no linear layer or convolution, or a layer cannot start so.
        """
        super().__call__(network, without)
        for layer in updated_layers(network).values():
            magnitude = layer.lora_magnitude_vector["default"].weight
            rows = layer.get_base_layer().weight.float().flatten(1)
            magnitude.data = rows.norm(dim=1).view_as(magnitude)  # peft's are rounded to the precision of W


@dataclass(frozen=True)
class LoCon(LowRankAdapter):
    """LoRA of attention, feed-forward layers and convolutions alike (LyCORIS, Yeh et al., 2023).

    Args:
        conv_rank: Rank of the updates of convolutions; rank if not given.
        conv_alpha: Alpha of the updates of convolutions; alpha if not given.
    """

    conv_rank: int | None = None
    conv_alpha: float | None = None

    unet_layers: ClassVar[tuple[str, ...]] = (
        *LowRankAdapter.unet_layers,
        *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    )
    text_layers: ClassVar[tuple[str, ...]] = (*LowRankAdapter.text_layers, "fc1", "fc2")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "conv_rank", self.conv_rank is None or self.conv_rank >= 1, "1 or more")

    def peft_config(self, sizes: Mapping[str, Size]) -> "PeftConfig":
        """Returns peft's description of the updates of the named layers."""
        from lit_edm.sdxl.lora_layers import lora_config  # which imports peft

        return lora_config(sizes, lora_dropout=self.dropout)

    def default_size(self, layer: nn.Module) -> tuple[int, float | None]:
        """Returns rank and alpha of layers that no pattern is given for."""
        if isinstance(layer, nn.Linear):
            return self.rank, self.alpha
        return self.conv_rank or self.rank, self.alpha if self.conv_alpha is None else self.conv_alpha
