from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_edm.errors import InputError
from lit_edm.sdxl import DoRA, LoCon, LoHa, LoKr, LoRA, SDXLCheckpoint
from lit_edm.sdxl.injection import base_layers, inject, weights_of
from lit_edm.sdxl.low_rank import updated_layers
from lit_edm.sdxl.updates import AdapterWeights, LoRAUpdate

LAYERS = ("to_q", "ff.net.2", "conv1", "conv_shortcut")
ADAPTERS: dict[str, Any] = {
    "lora": LoRA(rank=3, alpha=6.0, target_modules=LAYERS),
    "rslora": LoRA(rank=4, rank_stabilized=True),
    "dora": DoRA(rank=2, target_modules=LAYERS),
    "pissa": LoRA(rank=2, init="pissa"),
    "locon": LoCon(rank=2, conv_rank=3),
    "loha": LoHa(rank=2, alpha=1.0, target_modules=LAYERS),
    "lokr": LoKr(rank=1, alpha=3.0, factor=2, target_modules=LAYERS),
    "lokr_full": LoKr(rank=50, alpha=3.0, target_modules=LAYERS),
}


def unet_of(tiny: Path, adapter: Any = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A UNet with the adapter, whose values are far from where they start."""
    unet = SDXLCheckpoint(str(tiny)).load_unet(dtype)
    if adapter is not None:
        torch.manual_seed(0)
        adapter(unet)
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return unet


@torch.no_grad()
def output(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, context, pooled, ids = (torch.randn(s, generator=generator) for s in ((1, 4, 8, 8), (1, 5, 80), (1, 48), (1, 6)))
    return unet(x, torch.tensor([500]), context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
class TestEachKind:
    def test_a_base_computes_with_it_what_the_trained_network_does(self, tiny: Path, adapter: Any) -> None:
        trained, base = unet_of(tiny, adapter), unet_of(tiny)
        untouched = output(base)
        inject(weights_of({"unet": trained}), {"unet": base}, trainable=True)
        torch.testing.assert_close(output(base), output(trained), atol=1e-5, rtol=0)
        assert (output(base) - untouched).abs().max() > 1e-2

    def test_its_difference_can_be_added_to_the_weights(self, tiny: Path, adapter: Any) -> None:
        trained, base = unet_of(tiny, adapter), unet_of(tiny)
        layers = base_layers(base)
        for name, update in weights_of({"unet": trained}).networks["unet"].items():
            weight = layers[name][1].weight
            assert update.size == (len(weight), weight[0].numel())
            weight.data += update.delta(weight)
        torch.testing.assert_close(output(base), output(trained), atol=1e-4, rtol=0)

    def test_is_the_same_taken_off_again(self, tiny: Path, adapter: Any) -> None:
        weights, base = weights_of({"unet": unet_of(tiny, adapter)}), unet_of(tiny)
        inject(weights, {"unet": base}, trainable=True)
        again = weights_of({"unet": base}).networks["unet"]
        assert again.keys() == weights.networks["unet"].keys()
        for name, update in weights.networks["unet"].items():
            torch.testing.assert_close(again[name].product(), update.product(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("trainable", [True, False])
def test_updates_are_float32_and_trained_if_asked_for(tiny: Path, trainable: bool) -> None:
    weights = weights_of({"unet": unet_of(tiny, LoRA(rank=2))})
    base = unet_of(tiny, dtype=torch.bfloat16)
    inject(weights, {"unet": base}, trainable)
    updates = {name: value for name, value in base.named_parameters() if ".lora_" in name}
    assert len(updates) == 2 * len(weights.networks["unet"])
    assert {value.dtype for value in updates.values()} == {torch.float32}
    assert {name for name, value in base.named_parameters() if value.requires_grad} == (
        set(updates) if trainable else set()
    )


@pytest.mark.parametrize("second", ["lora", "loha", "dora"])
def test_adapters_add_up_and_leave_what_is_trained(tiny: Path, second: str) -> None:
    trained, other = unet_of(tiny, LoRA(rank=2)), weights_of({"unet": unet_of(tiny, ADAPTERS[second])})
    names = {name for name, value in trained.named_parameters() if value.requires_grad}
    first = weights_of({"unet": trained})
    inject(other, {"unet": trained}, trainable=False, name="second")
    now = {name.replace("base_layer.lora_", "lora_") for name, p in trained.named_parameters() if p.requires_grad}
    assert now == names
    if second != "dora":  # which is no sum
        base = unet_of(tiny)
        layers = base_layers(base)
        for weights in (first, other):
            for name, update in weights.networks["unet"].items():
                layers[name][1].weight.data += update.delta(layers[name][1].weight)
        torch.testing.assert_close(output(trained), output(base), atol=1e-4, rtol=0)


def test_text_encoders_have_published_names(tiny: Path) -> None:
    first, second = SDXLCheckpoint(str(tiny)).load_text_encoders(torch.float32)
    networks = {"text_encoder": first, "text_encoder_2": second}
    for encoder in networks.values():
        LoRA(rank=2)(encoder)
    weights = weights_of(networks)
    assert all(name.startswith("text_model.encoder.") for layers in weights.networks.values() for name in layers)
    first, second = SDXLCheckpoint(str(tiny)).load_text_encoders(torch.float32)
    inject(weights, {"text_encoder": first, "text_encoder_2": second}, trainable=True)
    assert len(updated_layers(first)) == len(updated_layers(second)) == 8


@pytest.mark.parametrize(
    ("network", "layer", "message"),
    [
        ("unet", "mid_block.attentions.7.proj_in", "x updates mid_block.attentions.7.proj_in, which the base does not"),
        ("unet", "mid_block.attentions.0.proj_in", "for another base: its update of .* is 5 x 3, but 32 x 32 in this"),
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", "x updates text_encoder, which is not there to take"),
    ],
)
def test_refuses_what_does_not_fit_and_leaves_the_networks(tiny: Path, network: str, layer: str, message: str) -> None:
    good = weights_of({"unet": unet_of(tiny, LoRA(rank=2))}).networks["unet"]
    bad = LoRAUpdate(torch.ones(2, 3), torch.ones(5, 2))
    weights = {"unet": good | {layer: bad}} if network == "unet" else {"unet": good, network: {layer: bad}}
    base = unet_of(tiny)
    with pytest.raises(InputError, match=message):
        inject(AdapterWeights(weights), {"unet": base}, trainable=True, source="x")
    assert not updated_layers(base)
