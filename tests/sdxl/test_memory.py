"""What is counted is held against passes with values, on the CPU and, where there is one, on a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from prodigyopt import Prodigy
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import CLIPTextModel

from lit_edm.optim import GroupedProdigy, WarmupSchedule
from lit_edm.sdxl import Adapter, DoRA, FullFinetune, LoCon, LoHa, LoKr, LoRA, SDXLCheckpoint
from lit_edm.sdxl.low_rank import casts_all_it_trains
from lit_edm.sdxl.memory import (
    Autocast,
    TrainingMemory,
    bytes_kept,
    kept_by_text_encoder,
    kept_by_unet,
    nothing,
    state_of,
)
from lit_edm.sdxl.sizes import text_size
from lit_edm.sdxl.tiny import text_config

GIB = 2**30


def name(adapter: object) -> str:
    return type(adapter).__name__


@pytest.mark.parametrize(
    ("adapter", "checkpointing", "gib"),
    [(LoRA(rank=8), False, 5.2), (LoRA(rank=8), True, 0.45), (DoRA(rank=8), False, 5.6)],
)
def test_the_real_sdxl(sdxl_unet: dict[str, Any], adapter: Adapter, checkpointing: bool, gib: float) -> None:
    """In bf16; peft's own layers keep 7.3 GiB for LoRA and 15.4 for DoRA, or 7.2 and 11.9 under autocast."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sdxl_unet).requires_grad_(False).bfloat16()
        adapter(unet)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    kept = kept_by_unet(unet, torch.bfloat16, (1, 4, 128, 128), learns_text=False)
    assert kept is not None
    assert kept / GIB == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "adapter",
    [LoRA(rank=2), LoRA(rank=2, init="pissa"), DoRA(), LoCon(rank=2), LoHa(rank=2), LoKr(rank=2), FullFinetune(), None],
    ids=name,
)
def test_as_much_as_a_pass_with_values(
    tiny: Path, adapter: Adapter | None, checkpointing: bool, held: Callable[..., int]
) -> None:
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.float32)
    if adapter is not None:
        adapter(unet)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    before, chance = {n: w.clone() for n, w in unet.state_dict().items()}, torch.get_rng_state()
    counted = kept_by_unet(unet, torch.float32, (2, 4, 16, 16), learns_text=True)
    assert torch.get_rng_state().equal(chance)
    assert all(weight.equal(before[name]) for name, weight in unet.state_dict().items()), "the network is left alone"
    context = torch.randn(2, 77, 80, requires_grad=True)
    added = {"text_embeds": torch.randn(2, 48), "time_ids": torch.randn(2, 6)}
    passed = held(unet, torch.randn(2, 4, 16, 16), torch.rand(2), context, added_cond_kwargs=added)
    assert counted == pytest.approx(passed, rel=0.02), "small numbers that are not kept with a checkpoint apart"


@pytest.mark.parametrize("adapter", [LoRA(rank=2), DoRA(rank=2), LoKr(rank=2), FullFinetune()], ids=name)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_as_much_as_under_autocast(
    tiny: Path, adapter: Adapter, device: str, held: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if device == "cpu":  # where autocast leaves norms in half precision
        monkeypatch.setattr(Autocast, "norms", set())
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.bfloat16)
    adapter(unet)
    counted = kept_by_unet(unet.train(), torch.bfloat16, (2, 4, 16, 16), learns_text=True)
    context = torch.randn(2, 77, 80, dtype=torch.bfloat16, device=device, requires_grad=True)
    added = {"text_embeds": torch.randn(2, 48, dtype=torch.bfloat16), "time_ids": torch.randn(2, 6)}
    added = {key: value.to(device) for key, value in added.items()}
    latents = torch.randn(2, 4, 16, 16, dtype=torch.bfloat16, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=not casts_all_it_trains(unet), cache_enabled=False):
        passed = held(unet.to(device), latents, torch.rand(2, device=device), context, added_cond_kwargs=added)
    assert counted == pytest.approx(passed, rel=0.02)


def test_a_batch_keeps_as_often_as_much(tiny: Path) -> None:
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.bfloat16)
    LoRA(rank=2)(unet)
    one, three = (kept_by_unet(unet, torch.bfloat16, (count, 4, 16, 16), learns_text=False) for count in (1, 3))
    assert one
    assert three
    assert three == pytest.approx(3 * one, rel=0.02)


def test_text_encoders_keep_what_they_learn_from(tiny: Path, held: Callable[..., int]) -> None:
    for encoder in SDXLCheckpoint(str(tiny)).load_text_encoders(torch.float32):
        assert kept_by_text_encoder(encoder, torch.float32, 2) == 0, "frozen"
        LoRA(rank=2)(encoder)
        assert kept_by_text_encoder(encoder, torch.float32, 2) == held(
            encoder, torch.ones(2, 77, dtype=torch.int64), output_hidden_states=True
        )


def test_a_text_encoder_that_reads_less_than_sdxls(held: Callable[..., int]) -> None:
    encoder = CLIPTextModel(text_config(text_size(16, 2, 2, 32, 16) | {"max_position_embeddings": 32}, 100))
    LoRA(rank=2)(encoder)
    captions = torch.ones(2, 32, dtype=torch.int64)
    counted = kept_by_text_encoder(encoder, torch.float32, 2)
    assert counted == held(encoder, captions, output_hidden_states=True)


def test_trained_weights_are_kept_in_half_precision_too() -> None:
    """As autocast does, whose layers compute in half precision whatever weights are held in."""
    layer = nn.Linear(8, 4, bias=False)
    kept = bytes_kept(layer, torch.bfloat16, nothing(3, 8, dtype=torch.bfloat16).requires_grad_())
    assert kept == 2 * (8 * 4 + 3 * 8), "the copy and the input"


def test_a_layer_that_asks_for_values() -> None:
    class Asks(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return super().forward(input) if input.sum().item() > 0 else input

    assert bytes_kept(Asks(2, 2), torch.float32, nothing(1, 2)) is None


@pytest.mark.parametrize(
    ("optimizer", "numbers"),
    [
        (AdamW, 2),
        (lambda groups: AdamW(groups, amsgrad=True), 3),
        (lambda groups: SGD(groups, lr=0.1), 0),
        (lambda groups: SGD(groups, lr=0.1, momentum=0.9), 1),
        (Prodigy, 4),
        (GroupedProdigy, 4),
        (lambda groups: GroupedProdigy(groups, slice_p=2), 3),
    ],
)
def test_the_state_of_an_optimizer(optimizer: Callable[..., Optimizer], numbers: int) -> None:
    weights = [nn.Parameter(torch.ones(128, 64)), nn.Parameter(torch.ones(64))]
    made = optimizer([{"params": [weight]} for weight in weights])
    settings = [{**group} for group in made.param_groups]
    assert state_of(made) == numbers * 4 * (128 * 64 + 64)
    assert made.param_groups == settings
    assert not made.state, "it has not been stepped"
    assert all(weight.eq(1).all() for weight in weights)


def test_the_state_of_an_optimizer_whose_rate_begins_at_0() -> None:
    weight = nn.Parameter(torch.ones(64))
    optimizer = GroupedProdigy([weight])
    schedule = WarmupSchedule(optimizer, warmup_steps=5)
    assert isinstance(schedule, LambdaLR)
    assert optimizer.param_groups[0]["lr"] == 0
    assert state_of(optimizer) == 4 * 4 * 64


def test_an_optimizer_that_takes_no_other_matrix() -> None:
    class Particular(SGD):
        def step(self, closure: Any = None) -> None:
            raise KeyError(self.param_groups[0]["params"])

    assert state_of(Particular([nn.Parameter(torch.ones(64))], lr=0.1)) == 2 * 4 * 64, "as Adam"


def test_the_sum() -> None:
    assert TrainingMemory(frozen=1, trained=20, optimizer=300, average=4000, activations=50_000).total == 54_341
    assert TrainingMemory(frozen=1, trained=20, optimizer=300, average=4000, activations=None).total == 4341
