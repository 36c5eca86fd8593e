"""Our forward passes against peft's own, layer by layer and in a whole UNet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from peft.tuners.lora.layer import Conv2d, Linear
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from lit_edm.edm import EpsPreconditioning
from lit_edm.sdxl import Adapter, Conditioning, DoRA, FullFinetune, LoCon, LoHa, LoRA, SDXLCheckpoint, SDXLDenoiser
from lit_edm.sdxl.lora_layers import LoRAConv2d, LoRALinear, ScaleRows, lora_config, norms
from lit_edm.sdxl.low_rank import Size, updated_layers

BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(24, 40),
    "no_bias": lambda: nn.Linear(24, 40, bias=False),
    "conv": lambda: nn.Conv2d(24, 40, 3, stride=2, padding=1),
    "1x1": lambda: nn.Conv2d(24, 40, 1),
}
INPUTS = {"linear": (2, 5, 24), "no_bias": (7, 24), "conv": (2, 24, 6, 8), "1x1": (2, 24, 4, 4)}
PEFTS: dict[type[nn.Module], Callable[..., Tensor]] = {LoRALinear: Linear.forward, LoRAConv2d: Conv2d.forward}


def layer_of(base: str, dtype: torch.dtype = torch.float32, trained: bool = True, **settings: Any) -> Any:
    """A layer whose update is not 0, in training mode; of a frozen base of that precision."""
    torch.manual_seed(0)
    network = nn.Sequential()
    network.add_module("layer", BASES[base]().requires_grad_(False).bfloat16().to(dtype))
    inject_adapter_in_model(lora_config({"layer": Size(3, 6.0)}, **settings), network)
    layer = network.get_submodule("layer")
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() + 0.1 * torch.randn(parameter.shape)
            parameter.requires_grad_(trained)
    return layer.train()


def computed(
    layer: Any, forward: Callable[..., Tensor], x: Tensor, gradient: Tensor | None = None
) -> dict[str, Tensor]:
    """The output for x and the gradients of x and of all that is trained, by name."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(1)
    output = forward(layer, x)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype))
    assert x.grad is not None
    found = {"output": output.detach(), "x": x.grad}
    return found | {name: value.grad for name, value in layer.named_parameters() if value.grad is not None}


def input_of(base: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(INPUTS[base], generator=torch.Generator().manual_seed(2)).bfloat16().to(dtype)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"lora_dropout": 0.5}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.5}],
    ids=["lora", "rslora", "dropout", "dora", "dora_with_dropout"],
)
def test_computes_what_peft_does(base: str, settings: dict[str, Any]) -> None:
    layer, x = layer_of(base, **settings), input_of(base)
    ours, theirs = (computed(layer, forward, x) for forward in (type(layer).forward, PEFTS[type(layer)]))
    assert ours.keys() == theirs.keys()
    assert len(ours) == (5 if settings.get("use_dora") else 4)
    for name, value in ours.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=1e-5, atol=2e-6 * theirs[name].abs().max().item(), msg=name
        )
        assert value.dtype == torch.float32


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_as_pefts(base: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """To the same layer in float32; factors and their gradients are float32."""
    exact = computed(layer_of(base, **settings), PEFTS[type(layer_of(base))], input_of(base))
    layer, x = layer_of(base, dtype, **settings), input_of(base, dtype)
    ours, theirs = (computed(layer, forward, x) for forward in (type(layer).forward, PEFTS[type(layer)]))
    for name, value in ours.items():
        assert value.dtype == (dtype if name in ("output", "x") else torch.float32)
        error, pefts = ((found[name].float() - exact[name]).norm() / exact[name].norm() for found in (ours, theirs))
        assert error < max(1.5 * pefts, 2 * torch.finfo(dtype).eps), name


@pytest.mark.parametrize("base", BASES)
def test_leaves_to_peft_what_is_not_usual(base: str) -> None:
    layer, x = layer_of(base), input_of(base)
    pefts = PEFTS[type(layer)]
    layer.enable_adapters(False)
    assert type(layer).forward(layer, x).equal(layer.base_layer(x))
    layer.enable_adapters(True)
    expected = pefts(layer, x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert layer(x).equal(layer.base_layer(x))
    layer.unmerge()
    config = lora_config({"layer": Size(2, 2.0)}, init_lora_weights=False)
    layer.update_layer("second", 2, lora_alpha=2.0, config=config)
    layer.set_adapter(["default", "second"])
    both = layer(x)
    assert both.equal(pefts(layer, x))
    assert not both.allclose(expected)
    layer.set_adapter("second")
    torch.testing.assert_close(layer(x), pefts(layer, x))


def test_norms_are_those_of_the_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*shape, generator=generator) for shape in ((30, 50), (4, 50), (30, 4)))
    expected = torch.linalg.norm(weight.double() + 0.5 * b.double() @ a.double(), dim=1)
    torch.testing.assert_close(norms(weight, a, b, 0.5).double(), expected, rtol=1e-6, atol=0)
    weight[3], b[3] = 0, 0  # as pruned bases have them
    assert 0 < norms(weight, a, b, 0.5)[3] < 1e-18


def test_a_row_of_zeros_stays_one() -> None:
    layer = layer_of("no_bias", use_dora=True)
    with torch.no_grad():
        layer.base_layer.weight[5] = layer.lora_B["default"].weight[5] = 0
        layer.lora_magnitude_vector["default"].weight[5] = 0
    found = computed(layer, LoRALinear.forward, input_of("no_bias"))
    assert found["output"][:, 5].eq(0).all()
    assert found["x"].isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_scaled_rows(bias: bool) -> None:
    y, factors = torch.randn(6, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.5
    shift = torch.randn(4, dtype=torch.float64) if bias else None
    torch.testing.assert_close(
        ScaleRows.apply(y, factors, shift), factors * y if shift is None else factors * (y - shift) + shift
    )
    assert gradcheck(lambda y, c: ScaleRows.apply(y, c, shift), (y.requires_grad_(), factors.requires_grad_()))


def kept_by(layers: list[Any], x: Tensor) -> int:
    """Bytes of activations that layers keep of one input: by storage, without weights and what is made of them."""
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x.numel() // 2:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
        kept = sum(storage.nbytes() for storage in storages.values())
    del outputs
    return kept


def test_layers_keep_their_common_input_once_and_as_it_is() -> None:
    x = torch.randn(4, 64, 24).bfloat16().requires_grad_()
    layers = [layer_of("no_bias", torch.bfloat16) for _ in range(3)]
    assert kept_by(layers, x) == x.nbytes
    scaled = [layer_of("no_bias", torch.bfloat16, use_dora=True) for _ in range(3)]
    outputs = 3 * 4 * 64 * 40 * 2  # which attention keeps anyway
    assert kept_by(scaled, x) == x.nbytes + outputs


@pytest.mark.parametrize("adapter", [LoRA(rank=3), DoRA(rank=3), LoCon(rank=2)], ids=lambda a: type(a).__name__)
def test_a_whole_unet_trains_as_with_peft(tiny: Path, adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = denoiser_of(tiny, adapter, torch.float32)
    layers = updated_layers(denoiser)
    assert {type(layer) for layer in layers.values()} <= {LoRALinear, LoRAConv2d}
    ours = gradients_of(denoiser)
    for kind, forward in PEFTS.items():
        monkeypatch.setattr(kind, "forward", forward)
    theirs = gradients_of(denoiser)
    assert ours.keys() == theirs.keys()
    assert len(ours) == sum(1 for parameter in denoiser.parameters() if parameter.requires_grad)
    for name, value in ours.items():
        assert (value - theirs[name]).norm() < 1e-5 * theirs[name].norm(), name


def denoiser_of(base: Path, adapter: Adapter, dtype: torch.dtype) -> SDXLDenoiser:
    """A denoiser with updates that are not 0."""
    torch.manual_seed(0)
    unet = SDXLCheckpoint(str(base)).load_unet(dtype)
    adapter(unet)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return SDXLDenoiser(unet.train(), EpsPreconditioning())


def gradients_of(denoiser: SDXLDenoiser) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    conditioning = Conditioning(
        torch.randn(2, 77, 80, generator=generator), torch.randn(2, 48, generator=generator), torch.full((2, 6), 64.0)
    )
    x = torch.randn(2, 4, 8, 8, generator=generator)
    denoiser.zero_grad()
    denoised = denoiser(x, torch.tensor([0.3, 5.0]), conditioning)
    assert denoised.dtype == torch.float32
    (denoised - 1).square().sum().backward()
    return {name: value.grad.clone() for name, value in denoiser.named_parameters() if value.grad is not None}


class TestAutocast:
    """Is left out of a UNet that casts all that it trains itself."""

    @pytest.mark.parametrize(
        ("adapter", "needed"),
        [
            (LoRA(), False),
            (DoRA(), False),
            (LoCon(), False),
            (LoRA(init="pissa"), False),
            (DoRA(target_modules=("to_q", "conv1")), True),
            (LoHa(), True),
            (FullFinetune(("mid_block",)), True),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Adapter) else str(value),
    )
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_is_on_where_it_is_needed(self, tiny: Path, adapter: Adapter, needed: bool, dtype: torch.dtype) -> None:
        denoiser = denoiser_of(tiny, adapter, dtype)
        seen: list[bool] = []
        denoiser.unet.conv_in.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        with torch.autocast("cpu", torch.bfloat16):
            gradients_of(denoiser)
        assert seen == [needed or dtype == torch.float32]

    @pytest.mark.parametrize("adapter", [LoRA(rank=3), DoRA(rank=3)], ids=lambda a: type(a).__name__)
    def test_is_not_missed(self, tiny: Path, adapter: Adapter) -> None:
        """Gradients in half precision are as near to those in float32 as with it."""
        exact = gradients_of(rounded(denoiser_of(tiny, adapter, torch.float32)))
        denoiser = denoiser_of(tiny, adapter, torch.bfloat16)
        errors = []
        for denoiser.needs_autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16):
                found = gradients_of(denoiser)
            errors.append(sum((found[name] - exact[name]).square().sum() for name in exact).sqrt())  # type: ignore[union-attr]
        assert errors[0] < 1.25 * errors[1]


def rounded(denoiser: SDXLDenoiser) -> SDXLDenoiser:
    """Rounds what is frozen to half precision, in place."""
    for parameter in denoiser.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()
    return denoiser
