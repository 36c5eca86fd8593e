from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_edm.errors import InputError
from lit_edm.sdxl import Adapter, DoRA, LoRA, SDXLCheckpoint
from lit_edm.sdxl.compilation import check_compiler, compile_blocks, uncompiled
from lit_edm.sdxl.memory import kept_by_unet


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles to torch's own operations: as much is traced as ever, and nothing waits for a C++ compiler."""
    monkeypatch.setattr(nn.Module, "compile", lambda module: original(module, backend="aot_eager"))


original = nn.Module.compile


def adapted(base: Path, adapter: Adapter) -> Any:
    """A UNet with updates that are not 0."""
    torch.manual_seed(0)
    unet = SDXLCheckpoint(str(base)).load_unet(torch.float32)
    adapter(unet)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return unet.train()


def gradients(unet: Any, side: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"sample": (2, 4, side, side), "context": (2, 77, 80), "text_embeds": (2, 48), "time_ids": (2, 6)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    sample, context = drawn.pop("sample"), drawn.pop("context")
    unet.zero_grad()
    unet(sample, torch.tensor([3.0, 500.0]), context, added_cond_kwargs=drawn).sample.square().sum().backward()
    return {name: value.grad.clone() for name, value in unet.named_parameters() if value.grad is not None}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("adapter", [LoRA(rank=2), DoRA(rank=2)], ids=["lora", "dora"])
def test_computes_the_same_in_one_graph_a_block(tiny: Path, adapter: Adapter) -> None:
    unet = adapted(tiny, adapter)
    expected, names = gradients(unet), list(unet.state_dict())
    compile_blocks(unet)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = gradients(unet)
    assert list(unet.state_dict()) == names, "checkpoints and exports know nothing of it"
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]


@pytest.mark.usefixtures("traced")
def test_all_blocks_of_a_width_share_what_is_compiled(tiny: Path) -> None:
    unet = adapted(tiny, LoRA(rank=2))
    blocks = [module for module in unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
    widths = {block.norm1.normalized_shape for block in blocks}
    compile_blocks(unet)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gradients(unet)
    assert len(blocks) > torch._dynamo.utils.counters["stats"]["unique_graphs"] >= len(widths)


@pytest.mark.usefixtures("traced")
def test_counting_compiles_nothing(tiny: Path) -> None:
    unet = adapted(tiny, LoRA(rank=2))
    expected = kept_by_unet(unet, torch.float32, (1, 4, 8, 8), learns_text=False)
    compile_blocks(unet)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert kept_by_unet(unet, torch.float32, (1, 4, 8, 8), learns_text=False) == expected
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with uncompiled(nn.Linear(2, 2)):
        assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_with_the_real_compiler(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    unet = adapted(tiny, LoRA(rank=2))
    expected = gradients(unet)
    compile_blocks(unet)
    for name, value in gradients(unet).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5 * expected[name].abs().max().item())
    assert any(tmp_path.rglob("*.so")), "kept for the next run"


@pytest.mark.parametrize(
    ("device", "place", "failing", "message"),
    [
        ("cpu", "torch._inductor.cpp_builder.get_cpp_compiler", "raises", r"no C\+\+ compiler: install g\+\+"),
        ("cuda", "torch.utils._triton.has_triton", "is false", "no triton"),
    ],
)
def test_what_cannot_compile_is_found_before_weights_are_loaded(
    device: str, place: str, failing: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def stands_in() -> bool:
        if failing == "raises":
            raise InvalidCxxCompiler
        return False

    monkeypatch.setattr(place, stands_in)
    with pytest.raises(InputError, match=message):
        check_compiler(torch.device(device))
    check_compiler(torch.device("meta"))


@pytest.mark.usefixtures("traced")
def test_a_module_trains_the_same(tiny: Path, icons: Path, trained_with: Callable[..., dict[str, Tensor]]) -> None:
    plain, compiled = (trained_with(tiny, icons, compile=compiles) for compiles in (False, True))
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-5)


@pytest.fixture
def trained_with(tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """What is trained after three steps."""
    from lightning.pytorch import Trainer, seed_everything

    from lit_edm.data import CaptionedImagesDataModule
    from lit_edm.modules import SDXLModule

    def train(base: Path, images: Path, **settings: Any) -> dict[str, Tensor]:
        seed_everything(0)
        module = SDXLModule(str(base), adapter=LoRA(rank=2), **settings)
        data = CaptionedImagesDataModule(str(images), resolution=16, batch_size=2)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_steps=3, accelerator="cpu", default_root_dir=tmp_path, **quiet)
        trainer.fit(module, data)
        compiled = [part for part in module.modules() if part._compiled_call_impl is not None]
        assert bool(compiled) == settings["compile"]
        return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}

    return train
