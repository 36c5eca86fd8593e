"""Gradient checkpointing by block: what the backward pass computes again so that the UNet keeps no more than fits.

A block of the UNet, a residual or a transformer block, either keeps all that its backward pass needs, or its inputs
alone, and is computed again then (Chen et al., 2016). Which blocks are is a knapsack problem, solved exactly: the UNet
has few kinds of blocks, so that few combinations are the cheapest of their size.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lit_edm.errors import InputError
from lit_edm.sdxl.memory import GIB, autocast_of, run_without_values, unet_inputs


@dataclass(frozen=True)
class Block:
    """A block that keeps something for the backward pass.

    Args:
        name: Its name in the UNet.
        size: Bytes that it keeps beyond its inputs, which it keeps in their place if it is computed again.
        flops: What it costs to compute it again, up to the last thing that the backward pass needs.
    """

    name: str
    size: int
    flops: int


class Combination(NamedTuple):
    """Blocks of the kinds looked at so far that keep what they need: how many of each kind, and what that is worth."""

    size: int
    flops: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Activations:
    """What a forward pass of a UNet keeps for the backward pass.

    Args:
        always: Bytes that are kept whatever is computed again, at the most: inputs of blocks that are, and what several
            blocks keep or what is in none.
        blocks: All blocks that keep more than their inputs, in the order of the forward pass.
    """

    always: int
    blocks: tuple[Block, ...]

    @property
    def total(self) -> int:
        """Bytes that are kept if nothing is computed again."""
        return self.always + sum(block.size for block in self.blocks)

    def computed_again(self, budget: float) -> tuple[Block, ...]:
        """Returns the blocks to compute again so that no more bytes than the budget are kept: the cheapest such choice.

        Of blocks that are alike the first are chosen: the backward pass comes to them last, when there is most room.

        Raises:
            ValueError: The budget is below `always`.
        """
        if budget < self.always:
            raise ValueError(f"{budget} is below {self.always}, which is kept whatever is computed again")
        kinds = Counter((block.size, block.flops) for block in self.blocks)
        front = [Combination(0, 0, ())]  # whoever keeps more of these keeps more FLOPs from being computed again
        for (size, flops), count in kinds.items():
            longer = [
                Combination(kept.size + number * size, kept.flops + number * flops, (*kept.counts, number))
                for kept in front
                for number in range(count + 1)
                if self.always + kept.size + number * size <= budget
            ]
            front = no_worse(longer)
        again = Counter({kind: kinds[kind] - kept for kind, kept in zip(kinds, front[-1].counts, strict=True)})
        chosen = []
        for block in self.blocks:
            if again[block.size, block.flops]:
                again[block.size, block.flops] -= 1
                chosen.append(block)
        return tuple(chosen)


def no_worse(combinations: Collection[Combination]) -> list[Combination]:
    """Returns those than which no other is as small and worth as much, by size."""
    front: list[Combination] = []
    for kept in sorted(combinations, key=lambda kept: (kept.size, -kept.flops)):
        if not front or kept.flops > front[-1].flops:
            front.append(kept)
    return front


def choose(
    unet: Any, dtype: torch.dtype, shape: tuple[int, int, int, int], learns_text: bool, gib: float
) -> tuple[Block, ...]:
    """Returns the blocks of an SDXL UNet to compute again so that no more is kept than so many GiB; see measure.

    Raises:
        InputError: Even if all blocks are computed again more is kept, or that cannot be counted.
    """
    key = f"model.init_args.gradient_checkpointing is {gib:g} GiB"
    try:
        activations = measure(unet, dtype, shape, learns_text)
    except RuntimeError as error:
        raise InputError(f"{key}, but what the adapter keeps cannot be counted; write true or false") from error
    try:
        return activations.computed_again(gib * GIB)
    except ValueError as error:
        least = ceil(activations.always / GIB * 100) / 100
        raise InputError(
            f"{key}, but the UNet keeps {least:.2f} of a batch of {shape[0]} even if all blocks are computed again; "
            "write at least that, lower data.init_args.batch_size, or train on smaller images"
        ) from error


def measure(unet: Any, dtype: torch.dtype, shape: tuple[int, int, int, int], learns_text: bool) -> Activations:
    """Finds out what each block of an SDXL UNet keeps and costs, by running it once without computing anything.

    Args:
        unet: UNet2DConditionModel with what is trained, on any device. Its gradient checkpointing is taken off.
        dtype: What it computes in.
        shape: Of a batch of latents, (B, C, h, w).
        learns_text: Whether the gradient goes on to what it is conditioned on.

    Raises:
        RuntimeError: Some layer asks for values.
    """
    names = {module: name for name, module in unet.named_modules()}
    storages: dict[int, Any] = {}  # held here so that no other takes its address
    keepers: dict[int, set[str]] = defaultdict(set)  # of each storage: blocks, or "" for what is in none
    inputs: dict[str, set[int]] = {}
    flops: dict[str, int] = {}
    block, before = "", 0

    def run(module: Any, *args: Any) -> Any:
        nonlocal block, before
        block, before = names[module], counter.get_total_flops()
        taken = [arg.untyped_storage() for arg in args if isinstance(arg, Tensor)]
        storages.update({storage._cdata: storage for storage in taken})
        inputs[block] = {storage._cdata for storage in taken}
        output = module(*args)
        block = ""
        return output

    def keep(storage: Any, of_weight: bool) -> None:
        if block:  # weights are looked for too when it is computed again, and it stops at the last that is found
            flops[block] = counter.get_total_flops() - before
        if not of_weight:
            storages[storage._cdata] = storage
            keepers[storage._cdata].add(block)

    args, kwargs = unet_inputs(unet.config, dtype, shape, learns_text)
    unet.enable_gradient_checkpointing(run)
    try:
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            run_without_values(unet, autocast_of(unet, dtype), keep, *args, **kwargs)
    finally:
        unet.disable_gradient_checkpointing()
    takers: dict[int, set[str]] = defaultdict(set)  # of each storage that is an input: blocks that would keep it
    for name in flops:
        for key in inputs[name]:
            takers[key].add(name)
    kept, instead, always = Counter[str](), Counter[str](), 0
    for key, storage in storages.items():
        keeping, taking = keepers.get(key, set()), takers.get(key, set())
        if len(keeping) == 1 and "" not in keeping and not taking:
            kept[min(keeping)] += storage.nbytes()
        elif not keeping and len(taking) == 1:
            instead[min(taking)] += storage.nbytes()
        elif keeping or taking:
            always += storage.nbytes()
    always += sum(min(kept[name], instead[name]) for name in flops)
    blocks = (Block(name, kept[name] - instead[name], flops[name]) for name in flops)
    return Activations(always, tuple(block for block in blocks if block.size > 0))


def attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Returns the FLOPs of attention by the shapes of its arguments."""
    return sdpa_flop_count(query, key, value)


ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops  # unlike others unknown to torch
}


def compute_again(unet: Any, names: Collection[str]) -> None:
    """Has blocks of a UNet computed again in the backward pass, and no others; what they compute stays the same."""
    chosen = {unet.get_submodule(name) for name in names}

    def run(block: Any, *args: Any) -> Any:
        return checkpoint(block, *args, use_reentrant=False) if block in chosen else block(*args)

    if chosen:
        unet.enable_gradient_checkpointing(run)
    else:
        unet.disable_gradient_checkpointing()
