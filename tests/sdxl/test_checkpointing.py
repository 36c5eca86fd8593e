"""Blocks that are computed again: what is kept, what it costs, and that it changes nothing else."""

from collections.abc import Callable
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lit_edm.errors import InputError
from lit_edm.sdxl import Adapter, DoRA, FullFinetune, LoRA, SDXLCheckpoint
from lit_edm.sdxl.checkpointing import ATTENTION, Activations, Block, choose, compute_again, measure
from lit_edm.sdxl.memory import kept_by_unet
from lit_edm.sdxl.outlines import adapted_unet

GIB = 2**30
SHAPE = (2, 4, 16, 16)
ADAPTERS = [LoRA(rank=2), LoRA(rank=2, init="pissa"), DoRA(rank=2), FullFinetune(), FullFinetune(("up_blocks",)), None]


def name(adapter: object) -> str:
    return type(adapter).__name__


def names(blocks: tuple[Block, ...]) -> list[str]:
    return [block.name for block in blocks]


def adapted(tiny: Path, adapter: Adapter | None) -> Any:
    torch.manual_seed(0)
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.float32)
    if adapter is not None:
        adapter(unet)
    return unet.train()


def inputs() -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    torch.manual_seed(1)
    context = torch.randn(2, 77, 80, requires_grad=True)
    added = {"text_embeds": torch.randn(2, 48), "time_ids": torch.randn(2, 6)}
    return (torch.randn(SHAPE), torch.rand(2), context), {"added_cond_kwargs": added}


def budgets(activations: Activations) -> list[float]:
    """From the least that is possible to more than is needed."""
    return [activations.always + part * (activations.total - activations.always) for part in (0, 0.3, 0.7, 0.95, 1.1)]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=name)
def test_a_pass_keeps_no_more_than_the_budget(tiny: Path, adapter: Adapter | None, held: Callable[..., int]) -> None:
    unet = adapted(tiny, adapter)
    activations = measure(unet, torch.float32, SHAPE, learns_text=True)
    sizes = sorted(block.size for block in activations.blocks)
    args, kwargs = inputs()
    for budget in budgets(activations):
        compute_again(unet, names(activations.computed_again(budget)))
        kept = held(unet, *args, **kwargs)
        assert min(budget, activations.total) - sizes[-1] < kept <= budget, "there is no room for a further block"


@pytest.mark.parametrize("adapter", ADAPTERS, ids=name)
def test_gradients_are_the_same_to_the_bit(tiny: Path, adapter: Adapter | None) -> None:
    unet = adapted(tiny, adapter)
    activations, found = measure(unet, torch.float32, SHAPE, learns_text=True), []
    for budget in budgets(activations):
        compute_again(unet, names(activations.computed_again(budget)))
        args, kwargs = inputs()
        unet.zero_grad()
        unet(*args, **kwargs).sample.square().mean().backward()
        found.append([args[-1].grad, *(p.grad.clone() for p in unet.parameters() if p.grad is not None)])
    assert len({len(activations.computed_again(budget)) for budget in budgets(activations)}) == len(found)
    assert all(a.equal(b) for one, other in pairwise(found) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("adapter", [LoRA(rank=2), FullFinetune(("up_blocks",))], ids=name)
def test_the_backward_pass_costs_as_much_more(tiny: Path, adapter: Adapter) -> None:
    unet = adapted(tiny, adapter)
    activations = measure(unet, torch.float32, SHAPE, learns_text=True)

    def cost() -> int:
        args, kwargs = inputs()
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            unet(*args, **kwargs).sample.square().mean().backward()
        return counter.get_total_flops()

    plain = cost()
    for budget in budgets(activations):
        chosen = activations.computed_again(budget)
        compute_again(unet, names(chosen))
        assert cost() == plain + sum(block.flops for block in chosen)


def test_no_choice_is_cheaper() -> None:
    kinds = [(5, 3), (5, 3), (7, 4), (2, 2), (9, 1), (5, 3), (4, 5)]
    blocks = tuple(Block(str(number), *kind) for number, kind in enumerate(kinds))
    activations = Activations(10, blocks)
    choices = list(chain.from_iterable(combinations(blocks, count) for count in range(len(blocks) + 1)))
    before = None
    for budget in range(10, 50):
        chosen = activations.computed_again(budget)
        assert activations.total - sum(block.size for block in chosen) <= budget
        fits = [some for some in choices if activations.total - sum(block.size for block in some) <= budget]
        cost = sum(block.flops for block in chosen)
        assert cost == min(sum(block.flops for block in some) for some in fits)
        assert before is None or cost <= before, "more room never costs more"
        before = cost
    assert before == 0


def test_of_like_blocks_the_first_are_computed_again() -> None:
    activations = Activations(0, tuple(Block(letter, 2, 1) for letter in "abcd"))
    assert names(activations.computed_again(5)) == ["a", "b"]


def test_the_outline_tells_the_same(tiny: Path) -> None:
    """So that what is chosen before weights are loaded fits what is loaded."""
    for adapter in (LoRA(rank=2, init="pissa"), DoRA(rank=2), FullFinetune(("up_blocks",))):
        chance = torch.get_rng_state()
        outline = adapted_unet(SDXLCheckpoint(str(tiny)), adapter, torch.bfloat16)
        assert torch.get_rng_state().equal(chance)
        loaded = SDXLCheckpoint(str(tiny)).load_unet(torch.bfloat16)
        if adapter is not None:
            adapter(loaded)
        loaded.train()
        assert measure(outline, torch.bfloat16, SHAPE, True) == measure(loaded, torch.bfloat16, SHAPE, True)


def test_the_real_sdxl(sdxl_unet: dict[str, Any]) -> None:
    """Computing all of it again is known to cost 19.6 - 14.5 TFLOP an image of 1024 px."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sdxl_unet).requires_grad_(False).bfloat16().train()
        LoRA(rank=8)(unet)
    shape = (1, 4, 128, 128)
    activations = measure(unet, torch.bfloat16, shape, learns_text=False)
    assert sum(block.flops for block in activations.blocks) / 1e12 == pytest.approx(5.1, abs=0.05)
    chosen = choose(unet, torch.bfloat16, shape, learns_text=False, gib=4)
    compute_again(unet, names(chosen))
    kept = kept_by_unet(unet, torch.bfloat16, shape, learns_text=False)
    assert kept is not None
    assert 3.95 * GIB < kept <= 4 * GIB
    assert activations.always / GIB == pytest.approx(0.43, abs=0.03)


def test_a_budget_that_nothing_fits(tiny: Path) -> None:
    unet = adapted(tiny, LoRA(rank=2))
    with pytest.raises(InputError, match=r"is 0\.0001 GiB, but the UNet keeps 0\.01 of a batch of 2 even if all"):
        choose(unet, torch.float32, SHAPE, learns_text=False, gib=1e-4)


def test_an_adapter_that_asks_for_values(tiny: Path) -> None:
    unet = adapted(tiny, LoRA(rank=2))
    unet.conv_in.register_forward_hook(lambda module, inputs, output: output.sum().item())
    with pytest.raises(InputError, match="cannot be counted; write true or false"):
        choose(unet, torch.float32, SHAPE, learns_text=False, gib=1.0)
    assert not unet.is_gradient_checkpointing
