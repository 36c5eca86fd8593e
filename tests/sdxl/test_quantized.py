"""Fast and plain are one: a network in codes computes what a plain one does that holds the weights made from them."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lit_edm.data import CaptionedImagesDataModule, TeacherPrior
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.sdxl import DoRA, FullFinetune, LoCon, LoHa, LoKr, LoRA, SDXLCheckpoint
from lit_edm.sdxl.export import export
from lit_edm.sdxl.formats import read_adapter
from lit_edm.sdxl.injection import base_layers, inject, weights_of
from lit_edm.sdxl.memory import bytes_of, kept_by_unet
from lit_edm.sdxl.quantized import BLOCK, QuantizedLayer, decode, encode, quantize


def load(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return SDXLCheckpoint(str(base)).load_unet(dtype).train()


def coded(network: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantizedLayer)}


def pair(base: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A UNet in codes, and a plain one with the same weights."""
    unet, plain = load(base, dtype), load(base, dtype)
    quantize(unet)
    for name, layer in coded(unet).items():
        plain.get_submodule(name).weight.data = layer.weight.clone()
    return unet, plain


def run(unet: Any, dtype: torch.dtype = torch.float32, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, context, pooled = (torch.randn(*s, generator=generator) for s in ((1, 4, size, size), (1, 77, 80), (1, 48)))
    added = {"text_embeds": pooled.to(dtype), "time_ids": torch.tensor([[1023.0, 768, 0, 3, 512, 512]])}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return unet(x.to(dtype), torch.tensor([7.0]), context.to(dtype), added_cond_kwargs=added).sample.float()


def trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


@torch.no_grad()
def move(network: nn.Module) -> None:
    """Changes all that is trained, as training does."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(network):
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("dtype", "checkpointing"), [(torch.float32, False), (torch.bfloat16, True)])
def test_equals_a_plain_network_to_the_bit(tiny: Path, dtype: torch.dtype, checkpointing: bool) -> None:
    """In outputs and in gradients, those of convolutions among them."""
    passes = []
    for unet in pair(tiny, dtype):
        torch.manual_seed(0)
        LoCon(rank=2)(unet)
        move(unet)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        output = run(unet, dtype)
        output.square().mean().backward()
        passes.append([output, *(parameter.grad for parameter in trained(unet))])
    assert len(passes[0]) > 200
    assert all(mine.equal(other) for mine, other in zip(*passes, strict=True))
    assert all(gradient.any() for gradient in passes[0])


@pytest.mark.parametrize(
    "adapter",
    [LoRA(init="pissa", rank=3), LoRA(init="olora", rank=3), DoRA(rank=3), LoHa(rank=2), LoKr(rank=2)],
    ids=lambda adapter: f"{type(adapter).__name__}-{getattr(adapter, 'init', '')}",
)
def test_adapters_read_the_weights_that_the_base_computes_with(tiny: Path, adapter: Any) -> None:
    """PiSSA and OLoRA start from a part of them, DoRA at their norms, and without its update each is the base."""
    passes = []
    for unet in pair(tiny, torch.float32):
        base = run(unet)
        torch.manual_seed(0)
        adapter(unet)
        torch.testing.assert_close(run(unet), base, rtol=1e-4, atol=1e-5)
        move(unet)
        output = run(unet)
        output.square().mean().backward()
        with adapter.disabled(unet):
            torch.testing.assert_close(run(unet), base)
        passes.append([output, *(value for p in trained(unet) for value in (p.detach(), p.grad))])
    assert all(mine.equal(other) for mine, other in zip(*passes, strict=True))


def test_text_encoders_compute_as_plain_ones(tiny: Path) -> None:
    for encoder in SDXLCheckpoint(str(tiny)).load_text_encoders(torch.float32):
        plain: Any = deepcopy(encoder)
        quantize(encoder)
        for name, layer in coded(encoder).items():
            plain.get_submodule(name).weight.data = layer.weight.clone()
        ids = torch.arange(77)[None]
        assert len(coded(encoder)) == 2 * 6, "four layers of attention and two feed-forward, twice"
        states, others = (network(ids, output_hidden_states=True).hidden_states for network in (encoder, plain))
        assert all(state.equal(other) for state, other in zip(states, others, strict=True))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_is_off_by_half_a_step_at_most(scale: float) -> None:
    weight = scale * torch.randn(200, BLOCK, generator=torch.Generator().manual_seed(3))
    codes, scales = encode(weight)
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert codes.dtype == torch.int8
    assert codes.int().abs().amax(1).eq(127).all(), "the largest of each block is exact"
    torch.testing.assert_close(codes.int(), (weight.double() / steps).round().int(), atol=1, rtol=0)
    assert ((decode(codes, scales) - weight).abs() <= 0.501 * steps).all()


def test_what_can_be_held_is_held_exactly() -> None:
    """Zeros, too, whose blocks have no scale; and what has been held before comes back as it was."""
    held = torch.randint(-126, 127, (5, BLOCK), generator=torch.Generator().manual_seed(3))
    held[:, 7] = 127
    weight = torch.cat([torch.zeros(1, BLOCK), held * torch.tensor([[2.0**n] for n in range(5)])])
    assert decode(*encode(weight)).equal(weight)


def test_takes_less_room_and_names_what_it_named(tiny: Path) -> None:
    unet, plain = load(tiny, torch.bfloat16), load(tiny, torch.bfloat16)
    quantize(unet)
    layers = coded(unet)
    shapes = [{n: tuple(layer.weight.shape) for n, (_, layer) in base_layers(net).items()} for net in (unet, plain)]
    assert shapes[0] == shapes[1]
    ends = {name.split(".")[0] for name in shapes[0] if name not in layers}
    assert ends == {"conv_in", "conv_out", "time_embedding", "add_embedding"}
    before = bytes_of(plain.get_submodule(name).weight for name in layers)
    assert bytes_of(unet.parameters()) == bytes_of(plain.parameters()) - before + before * 8.25 / 16


def test_no_weight_is_kept_for_the_backward_pass(tiny: Path) -> None:
    """The count of what a pass keeps, made without values, says so too."""
    unet = load(tiny)
    quantize(unet)
    LoRA(rank=2)(unet)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        run(unet)
    wide = {tuple(layer.weight.shape) for layer in coded(unet).values() if isinstance(layer, nn.Conv2d)}
    assert wide.intersection(tuple(tensor.shape) for tensor in kept), "codes, which are there anyway"
    assert not wide.intersection(tuple(tensor.shape) for tensor in kept if tensor.is_floating_point())
    plain = load(tiny)
    LoRA(rank=2)(plain)
    counts = [kept_by_unet(network, torch.float32, (1, 4, 8, 8), learns_text=False) for network in (unet, plain)]
    assert counts[0] < counts[1], "where autograd keeps the input of a frozen convolution, which nobody needs"


@pytest.fixture
def fit(tiny: Path, icons: Path, trainer: Callable[..., Trainer]) -> Callable[..., tuple[SDXLModule, Trainer]]:
    """Trains updates of UNet and text encoders on a base in codes, with the base as the teacher of a class."""

    def run(steps: int, ckpt_path: Path | None = None) -> tuple[SDXLModule, Trainer]:
        seed_everything(0)
        module = SDXLModule(
            str(tiny),
            tokens={"TOK": 1},
            adapter=LoRA(rank=2),
            text_encoder_adapter=LoRA(rank=2),
            quantization="int8",
            text_encoder_quantization="int8",
        )
        images = CaptionedImagesDataModule(icons, resolution=16, batch_size=4, prior=TeacherPrior("an icon"))
        training = trainer(max_steps=steps, precision="bf16-mixed")
        training.fit(module, images, ckpt_path=ckpt_path)
        return module, training

    return run


def test_a_run_goes_on_to_the_bit(fit: Callable[..., tuple[SDXLModule, Trainer]], tmp_path: Path) -> None:
    whole, _ = fit(4)
    _, half = fit(2)
    half.save_checkpoint(path := tmp_path / "half.ckpt")
    kept = torch.load(path, weights_only=True)["state_dict"]
    assert kept.keys() == {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    resumed, _ = fit(4, path)
    assert all(mine.equal(other) for mine, other in zip(trained(whole), trained(resumed), strict=True))
    assert coded(whole.conditioner.encoders)
    for name, layer in coded(whole).items():
        assert layer.codes.equal(resumed.get_submodule(name).codes), "the base stays as it is"


def test_what_is_exported_goes_on_the_base_as_it_was(tiny: Path, tmp_path: Path) -> None:
    module = SDXLModule(str(tiny), adapter=DoRA(rank=2), quantization="int8")
    module.configure_model()
    unet, plain = module.denoiser.unet, load(tiny)
    base, rounded = run(plain), run(unet)
    move(unet)
    export(module.networks(), tmp_path, "a")
    inject(read_adapter(tmp_path), {"unet": plain}, trainable=False)
    assert weights_of({"unet": plain}).networks["unet"].keys() == weights_of({"unet": unet}).networks["unet"].keys()
    change = (rounded - base).norm()
    assert (run(unet) - run(plain)).norm() < 1.5 * change, "no further apart than the bases are"
    assert (run(plain) - base).norm() > 3 * change


def test_pictures_say_what_they_were_drawn_with(tiny: Path) -> None:
    settings = SDXLModule(str(tiny), quantization="int8").picture_settings()
    assert (settings["quantization"], settings["text_encoder_quantization"]) == ("int8", None)


@pytest.mark.parametrize("setting", ["quantization", "text_encoder_quantization"])
def test_weights_that_are_trained_keep_their_precision(tiny: Path, setting: str) -> None:
    adapter = {"adapter" if setting == "quantization" else "text_encoder_adapter": FullFinetune()}
    with pytest.raises(InputError, match=f"{setting} is int8, which is for frozen weights, but FullFinetune"):
        SDXLModule(str(tiny), **{setting: "int8"}, **adapter).setup("fit")
