"""Two processes with a UNet in shards train what one process does with all of it."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from prodigyopt import Prodigy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_edm.callbacks import (
    ExponentialMovingAverage,
    FreezeEmbeddings,
    RetractEmbeddings,
    SaveAdapter,
    SkipNonFinite,
    TrainDuring,
    ValidationImages,
    ValidationLoss,
)
from lit_edm.data import CaptionedImagesDataModule, ClassImages
from lit_edm.edm import EDMLoss, EDMWeighting, HeunSampler, LearnedWeighting, UniformTimesteps
from lit_edm.errors import InputError
from lit_edm.modules import FSDP2Strategy, SDXLModule
from lit_edm.modules.fsdp2 import check_strategy
from lit_edm.modules.sharding import clip_gradients, gathered, unsharded
from lit_edm.optim import GroupedProdigy
from lit_edm.optim.shards import local
from lit_edm.sdxl import FullFinetune, LoRA

STEPS = 4


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Trains for four steps of four images each, on one process or on two; returns the last checkpoint."""
    for folder, count in {"instance": 8, "held_out": 3}.items():
        (tmp_path / folder).mkdir()
        for index in range(count):
            picture = Image.effect_noise((16, 16), 40 + index).convert("RGB")
            picture.save(tmp_path / folder / f"{index}.png")

    def train(
        name: str, processes: int, *callbacks: Callback, data: dict[str, Any] | None = None, **settings: Any
    ) -> dict[str, Any]:
        arguments = tiny, tmp_path, name, processes, callbacks, data or {}, settings
        if processes == 1:
            fit(*arguments)
        else:
            in_processes(fit, *arguments)
        return torch.load(tmp_path / name / f"step={STEPS}.ckpt", weights_only=True)

    return train


def fit(
    tiny: Path,
    folder: Path,
    name: str,
    processes: int,
    callbacks: tuple[Callback, ...],
    data: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    seed_everything(3, verbose=False)
    text = {"tokens": {"TOK": 2}, "text_encoder_adapter": LoRA(rank=2)}
    loss = EDMLoss(UniformTimesteps(), LearnedWeighting(EDMWeighting(1.0)))
    defaults = {"loss": loss, "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-3, eps=1e-3), **text}
    ckpt_path, accumulate = settings.pop("ckpt_path", None), settings.pop("accumulate", 1)
    module = SDXLModule(str(tiny), **(defaults | settings))
    images = CaptionedImagesDataModule(
        str(folder / "instance"),
        resolution=16,
        instance_prompt="an icon of TOK",
        batch_size=4 // processes // accumulate,
        **data,
    )
    keeper = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=STEPS // 2, save_top_k=-1)
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=processes,
        strategy="fsdp2" if processes > 1 else "auto",
        gradient_clip_val=0.5,
        accumulate_grad_batches=accumulate,
        callbacks=[*callbacks, keeper],
        default_root_dir=folder / name,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, images, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)


def in_processes(function: Callable[..., None], *arguments: Any) -> None:
    """Calls a function in two processes that a launcher might have started; raises what one of them raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(as_process, (port, function, arguments), 2, start_method="fork")


def as_process(rank: int, port: int, function: Callable[..., None], arguments: Any) -> None:
    place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    function(*arguments)


class Sharded(Callback):
    """Fails where shards are none, and where what is whole differs between processes."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: SDXLModule, *_: Any) -> None:
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        every: Any = trainer.strategy.all_gather(flat([p.detach() for p in trained if not isinstance(p, DTensor)]))
        assert every[0].equal(every[1]), f"the processes differ after batch {trainer.global_step}"
        unet = list(pl_module.denoiser.unet.parameters())
        here, all_of_it = sum(local(p).numel() for p in unet), sum(p.numel() for p in unet)
        assert 0.4 * all_of_it < here < 0.6 * all_of_it


class NumberOfWeights(Callback):
    """Fails where the first process cannot gather all weights, or any process has none to compute with."""

    def on_train_end(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        unet = pl_module.denoiser.unet
        before = [local(parameter).clone() for parameter in unet.parameters()]
        count = sum(parameter.numel() for parameter in unet.parameters())
        with unsharded(pl_module):
            computed_with = flat(list(unet.parameters()))
        assert computed_with.numel() == count
        with gathered(pl_module):
            assert trainer.global_rank == 1 or flat(list(unet.parameters())).equal(computed_with)
        assert all(local(now).equal(then) for now, then in zip(unet.parameters(), before, strict=True))


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def assert_same(one: dict[str, Any], two: dict[str, Any], exactly: bool = False) -> None:
    """Compares what checkpoints keep of weights and optimizers."""
    atol = 0.0 if exactly else 1e-6
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=0.0, atol=atol)
    (mine,), (other,) = two["optimizer_states"], one["optimizer_states"]
    assert mine["param_groups"] == other["param_groups"]
    torch.testing.assert_close(mine["state"], other["state"], rtol=0.0, atol=atol)


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": FullFinetune()},
        {"adapter": LoRA(rank=3), "gradient_checkpointing": True, "accumulate": 2},
        {"adapter": FullFinetune(blocks=("*.attn2",)), "tokens": None, "text_encoder_adapter": None},
    ],
    ids=["whole", "lora", "blocks"],
)
def test_two_processes_equal_one(run: Callable[..., dict[str, Any]], settings: dict[str, Any]) -> None:
    phases = [FreezeEmbeddings(0.5), TrainDuring("unet", start=0.25)] if settings.get("tokens", 1) else []
    one = run("one", 1, *phases, **settings)
    two = run("two", 2, *phases, Sharded(), NumberOfWeights(), **settings)
    assert len(one["optimizer_states"][0]["state"]) > 10
    assert_same(one, two)


def test_runs_go_on_with_shards_and_without(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    whole = run("two", 2, adapter=FullFinetune())
    half = str(tmp_path / "two" / f"step={STEPS // 2}.ckpt")
    assert_same(whole, run("again", 2, adapter=FullFinetune(), ckpt_path=half), exactly=True)
    run("one", 1, adapter=FullFinetune())
    from_one = str(tmp_path / "one" / f"step={STEPS // 2}.ckpt")
    there, back = (
        run(f"on_{processes}", processes, adapter=FullFinetune(), ckpt_path=path)
        for processes, path in ((2, from_one), (1, half))
    )
    assert_same(whole, there)
    assert_same(whole, back)


def test_processes_may_have_different_numbers_of_pictures(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    class_images = ClassImages(root=str(tmp_path / "class"), prompt="an icon", num_images=5)  # in batches of four
    data = {"prior": class_images, "val_root": str(tmp_path / "held_out")}
    run("two", 2, ValidationLoss(sigmas=[1.0]), data=data, adapter=LoRA(rank=2))
    assert len(list((tmp_path / "class").glob("*.png"))) == 5


def test_averages_pictures_and_files_are_those_of_one_process(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    def callbacks() -> list[Callback]:
        pictures = ValidationImages(["a TOK"], every_n_steps=2, resolution=16, sampler=HeunSampler(num_steps=2))
        return [RetractEmbeddings(), SkipNonFinite(), ExponentialMovingAverage(half_life=8), pictures, SaveAdapter()]

    one = run("one", 1, *callbacks(), adapter=FullFinetune())
    two = run("two", 2, *callbacks(), adapter=FullFinetune())
    averages = [kept["callbacks"]["ExponentialMovingAverage"]["average"] for kept in (one, two)]
    torch.testing.assert_close(*averages, rtol=0.0, atol=1e-6)
    for file in ("unet/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"):
        mine, other = (load_file(tmp_path / name / "adapter" / file) for name in ("one", "two"))
        torch.testing.assert_close(mine, other, rtol=0.0, atol=1e-6)
    shown = [pixels_of(tmp_path / name / "images" / f"step_{STEPS:06d}" / "00.png") for name in ("one", "two")]
    torch.testing.assert_close(*shown, rtol=0, atol=1)


def pixels_of(path: Path) -> Tensor:
    picture = Image.open(path)
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int()


def test_clips_as_torch_does() -> None:
    mine, theirs = (nn.Linear(5, 3) for _ in range(2))
    for module in (mine, theirs):
        for index, parameter in enumerate(module.parameters()):
            parameter.grad = torch.linspace(-1, 2, parameter.numel()).view_as(parameter) + index
    for by_norm, clip in ((True, nn.utils.clip_grad_norm_), (False, nn.utils.clip_grad_value_)):
        clip(theirs.parameters(), 0.6 if by_norm else 0.1)
        clip_gradients(mine.parameters(), 0.6 if by_norm else 0.1, by_norm)
        for own, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad)


def test_prodigy_finds_the_rate_of_whole_weights(run: Callable[..., dict[str, Any]]) -> None:
    settings = {"adapter": FullFinetune(), "optimizer": lambda groups: GroupedProdigy(groups, d0=1e-3)}
    one, two = (
        [group["d_denom"] for group in run(name, processes, **settings)["optimizer_states"][0]["param_groups"]]
        for name, processes in (("one", 1), ("two", 2))
    )
    assert [float(found) for found in two] == pytest.approx([float(found) for found in one], rel=1e-3)


def test_prodigy_of_others_is_refused(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="Prodigy finds its rate from whole"):
        run("two", 2, optimizer=Prodigy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (ModelParallelStrategy(), "32-true", "fit", None, {}),
            "ModelParallelStrategy, .* write trainer.strategy: fsdp2",
        ),
        ((FSDP2Strategy(), "32-true", "predict", None, {}), "is for training"),
        ((FSDP2Strategy(), "16-mixed", "fit", None, {}), "use bf16-mixed"),
        (
            (FSDP2Strategy(), "32-true", "fit", SimpleNamespace(needs_teacher=True), {"compile": False}),
            "is TeacherPrior",
        ),
        (
            (FSDP2Strategy(), "32-true", "fit", None, {"compile": False, "quantization": "int8"}),
            "quantization is int8, which trainer.strategy: fsdp2 cannot split",
        ),
    ],
)
def test_what_shards_cannot_do_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_strategy(*arguments)


def test_has_a_short_name() -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy="fsdp2", logger=False, enable_checkpointing=False)
    assert isinstance(trainer.strategy, FSDP2Strategy)
