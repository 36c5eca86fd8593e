import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from lit_edm.callbacks import ExponentialMovingAverage, SampleSheet, SaveAdapter, ValidationImages
from lit_edm.callbacks.ema import averaged
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.edm import EulerSampler
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.sdxl import LoRA
from lit_edm.sdxl.formats.writing import diffusers_tensors, loras_of
from lit_edm.sdxl.injection import weights_of

Make = Callable[..., Any]


def values(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(value.equal(b[name]) for name, value in a.items())


class Trajectory(Callback):
    """Keeps the weights before training and after each batch, and the images of each batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.images: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights.append(values(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append(values(pl_module))
        self.images.append(len(batch["image"]))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("half_life", "rampup"), [(9.0, None), (9.0, 0.5), (1e6, 0.25)])
def test_is_the_recursion_of_the_paper(
    pixels: Make, patches: Make, trainer: Make, accumulate: int, half_life: float, rampup: float | None
) -> None:
    """Epochs of 3 + 3 + 1 images: steps see different numbers of images."""
    ema, seen = ExponentialMovingAverage(half_life, rampup), Trajectory()
    trainer(ema, seen, max_steps=6, accumulate_grad_batches=accumulate).fit(pixels(), patches())
    name = "network.first.weight"
    expected, images = seen.weights[0][name].double(), 0
    boundaries = {1: [1, 2, 3, 4, 5, 6], 2: [2, 3, 5, 6, 8, 9]}[accumulate]  # an epoch's end closes a step
    for start, end in zip([0, *boundaries], boundaries, strict=False):
        n = sum(seen.images[start:end])
        limit = min(half_life, float("inf") if rampup is None else rampup * images)
        kept = 0.5 ** (n / limit) if limit > 0 else 0.0
        expected = kept * expected + (1 - kept) * seen.weights[end][name].double()
        images += n
    assert ema.images_seen == images == sum(seen.images)
    torch.testing.assert_close(ema.average[name].double(), expected, rtol=1e-4, atol=1e-7)
    assert not ema.average[name].equal(seen.weights[-1][name])


def test_averages_what_is_trained_alone(tiny: Path, icons: Path, trainer: Make) -> None:
    ema, module = ExponentialMovingAverage(), SDXLModule(str(tiny), tokens={"TOK": 1}, adapter=LoRA(rank=2))
    trainer(ema, max_steps=1).fit(module, CaptionedImagesDataModule(icons, resolution=16))
    assert ema.average.keys() == values(module).keys()
    assert sum(v.numel() for v in ema.average.values()) < sum(p.numel() for p in module.parameters()) / 5
    assert same(ema.average, values(module)), "of nothing seen before, the first step keeps nothing"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumes_bit_by_bit_with_weights_only_loading(
    pixels: Make, patches: Make, trainer: Make, tmp_path: Path, accumulate: int
) -> None:
    one_batch = DataLoader(patches().read()[0][:3] * 20, 3)  # twenty times; this loader cannot resume where it was

    def fit(steps: int, **settings: Any) -> tuple[Trainer, ExponentialMovingAverage]:
        ema = ExponentialMovingAverage(20.0, 0.5)
        fitted = trainer(ema, max_steps=steps, accumulate_grad_batches=accumulate)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
            fitted.fit(pixels(), one_batch, **settings)
        return fitted, ema

    fit(3)[0].save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(6, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    _, whole = fit(6)
    assert resumed.images_seen == whole.images_seen == 18 * accumulate
    assert same(resumed.average, whole.average)


class Looks(Callback):
    """Keeps the weights that validation and training see, and notes what a checkpoint holds."""

    def __init__(self) -> None:
        self.validated: list[dict[str, Tensor]] = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            with averaged(trainer, pl_module):  # on loan already
                self.validated.append(values(pl_module))


def test_is_validated_while_weights_are_trained_and_both_are_saved(
    pixels: Make, patches: Make, trainer: Make, tmp_path: Path
) -> None:
    ema, looks, seen, module = ExponentialMovingAverage(50.0, None), Looks(), Trajectory(), pixels()
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer(looks, ema, seen, checkpoint, max_steps=3, enable_checkpointing=True).fit(module, patches())
    assert len(looks.validated) == 2
    assert all(same(weights, ema.average) for weights in looks.validated)
    assert same(values(module), seen.weights[-1])
    assert not same(values(module), ema.average)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same({name: saved["state_dict"][name] for name in ema.average}, values(module))
    assert same(saved["callbacks"]["ExponentialMovingAverage"]["average"], ema.average)


def test_is_what_validate_shows_of_a_checkpoint(pixels: Make, patches: Make, trainer: Make, tmp_path: Path) -> None:
    ema, looks = ExponentialMovingAverage(50.0, None), Looks()
    fitted = trainer(ema, max_steps=3)
    fitted.fit(pixels(), patches(held_out=0.0))
    fitted.save_checkpoint(tmp_path / "x.ckpt")
    again = trainer(ExponentialMovingAverage(50.0, None), looks)
    again.validate(pixels(), patches(), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert same(looks.validated[0], ema.average)


class Fails(Callback):
    def on_validation_batch_end(self, *_: Any) -> None:
        raise ZeroDivisionError


def test_weights_come_back_after_an_error(pixels: Make, patches: Make, trainer: Make) -> None:
    ema, seen, module = ExponentialMovingAverage(50.0, None), Trajectory(), pixels()
    run = trainer(ema, seen, Fails(), num_sanity_val_steps=0)
    with pytest.raises(ZeroDivisionError):
        run.fit(module, patches())
    assert same(values(module), seen.weights[-1])
    lent = []
    with pytest.raises(KeyError), averaged(run, module):
        lent.append({}[str(same(values(module), ema.average))])
    assert same(values(module), seen.weights[-1])


def test_pictures_and_files_show_the_average(tiny: Path, icons: Path, trainer: Make, tmp_path: Path) -> None:
    module, ema = SDXLModule(str(tiny), tokens={"TOK": 1}, adapter=LoRA(rank=2)), ExponentialMovingAverage(50.0, None)
    pictures = ValidationImages(["TOK"], resolution=16, sampler=EulerSampler(1))
    rendered: list[dict[str, Tensor]] = []
    pictures.render = lambda module: rendered.append(values(module)) or torch.zeros(1, 3, 4, 4)  # type: ignore[method-assign]
    trainer(ema, pictures, SaveAdapter("x")).fit(module, CaptionedImagesDataModule(icons, resolution=16))
    assert same(rendered[-1], ema.average)
    assert not same(values(module), ema.average)
    with ema.averaged(module):
        expected = diffusers_tensors(loras_of(weights_of({"unet": module.denoiser.unet})))
        embeddings = {name: rows.clone() for name, rows in module.conditioner.new_embeddings().items()}
    assert same(load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors"), expected)
    assert same(load_file(tmp_path / "adapter" / "x_emb.safetensors"), embeddings)


def test_nothing_changes_without_the_callback(pixels: Make, trainer: Make) -> None:
    module = pixels()
    before = values(module)
    with averaged(trainer(), module):
        assert same(values(module), before)


@pytest.mark.parametrize("setting", [{"half_life": 0.0}, {"half_life": float("nan")}, {"rampup_ratio": -1.0}])
def test_settings_outside_their_range(setting: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"ExponentialMovingAverage\.\w+ is .*; it must be positive"):
        ExponentialMovingAverage(**setting)


def test_two_processes_count_the_images_of_both(pixels: Make, patches: Make, trainer: Make, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = (ExponentialMovingAverage(50.0, None), SampleSheet(samples=1, num_steps=1), checkpoint)
    run = trainer(*callbacks, max_steps=2, strategy="ddp_fork", devices=2, enable_checkpointing=True)
    run.fit(pixels(), patches(batch_size=2))  # seven images: four for each process, one of them twice, with weight 0
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["ExponentialMovingAverage"]
    assert saved["images_seen"] == 7
