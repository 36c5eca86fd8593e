"""What of the UNet and of the text encoders is trained."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from lit_edm.errors import InputError
from lit_edm.sdxl.layers import adapter_key, chosen, matches


class Adapter(ABC):
    """Makes part of a frozen network trainable: of the UNet, or of a CLIP text encoder.

    Every trainable value must be float32: bf16 swallows small updates. What stays frozen keeps its precision.
    """

    @abstractmethod
    def __call__(self, network: nn.Module, without: Sequence[str] = ()) -> None:
        """Adds or unfreezes parameters in place.

        Args:
            network: UNet2DConditionModel, CLIPTextModel or CLIPTextModelWithProjection, frozen.
            without: Layers to leave as they are, such as those that get no gradient: their names, or patterns.
        """

    def check(self, network: nn.Module, without: Sequence[str] = ()) -> None:  # noqa: B027 (a class may leave it out)
        """Finds mistakes before weights are loaded.

        Args:
            network: One whose parameters have shapes, but no values (on the meta device).
            without: Layers to leave as they are, as above.

        Raises:
            InputError: This would be raised with the weights, too.
        """

    @abstractmethod
    def disabled(self, network: nn.Module) -> AbstractContextManager[None]:
        """Lets the network compute what the untouched base computes, as long as the context is open."""


@dataclass(frozen=True)
class FullFinetune(Adapter):
    """Trains the weights themselves, held in float32.

    Args:
        blocks: Layers or blocks to train, such as mid_block or up_blocks.*.attn2; everything if empty.
        embeddings: Train the tables of embeddings, too, as a base that has learned nothing needs it. A base that has
            learned needs none of it: new tokens have their own.
    """

    blocks: tuple[str, ...] = ()
    embeddings: bool = False

    def __call__(self, network: nn.Module, without: Sequence[str] = ()) -> None:
        """Unfreezes the weights.

        Those of layers behind all that is used become float32 as well: norms on a CPU take no input of another
        precision than their own, and what comes in is float32.

        Raises:
            InputError: A block is not in the network.
        """
        for name in self.layers(network):
            used = not any(matches(name, pattern) for pattern in without)
            hold_in_float32(network.get_submodule(name).parameters(recurse=False), used)

    def check(self, network: nn.Module, without: Sequence[str] = ()) -> None:
        """Raises InputError if a block is not in the network."""
        self.layers(network)

    def layers(self, network: nn.Module) -> list[str]:
        """Returns the names of the layers of all blocks."""
        names = [
            name
            for name, layer in network.named_modules()
            if (self.embeddings or not isinstance(layer, nn.Embedding))
            and next(layer.parameters(recurse=False), None) is not None
        ]
        return chosen(names, self.blocks, f"{adapter_key(network)}.init_args.blocks")

    def disabled(self, network: nn.Module) -> AbstractContextManager[None]:
        """Raises InputError: there is no copy of the base."""
        raise InputError(
            f"{adapter_key(network)} is FullFinetune, which keeps no copy of the base to compare with: "
            "preserve the prior with class images, or train a LoRA"
        )


class InitialUpdate(nn.Module):
    """Takes the update that a layer starts with out of its output: W x + s (B A - B0 A0) x.

    PiSSA and OLoRA start from a part of W itself and have s B0 A0 taken out of W. Here it is taken out of the output,
    which is the same function: W stays the base's, to the bit, for a teacher, a checkpoint and a merge, at the cost of
    one more product with low-rank matrices. It is a forward hook of the layer that it belongs to.

    Args:
        a: A0, (rank, in).
        b: s B0, (out, rank).
    """

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Returns the output (..., out) of the layer for its input (..., in) without the initial update."""
        if layer.disable_adapters:
            return output
        update = functional.linear(functional.linear(inputs[0].to(self.a.dtype), self.a), self.b)
        return output - update.to(output.dtype)


def initial_state(network: nn.Module) -> dict[str, Tensor]:
    """Returns what a checkpoint needs besides trained parameters: each InitialUpdate, by its name in the network.

    Loading them is all there is to resuming. They depend on the order of a library's arithmetic, or on chance, so
    another process may not make them anew.
    """
    return {
        f"{name}.{key}": buffer
        for name, module in network.named_modules()
        if isinstance(module, InitialUpdate)
        for key, buffer in module.named_buffers()
    }


def hold_in_float32(parameters: Iterable[nn.Parameter], trained: bool = True) -> None:
    """Makes parameters float32, in place, and trainable or not."""
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(trained)
