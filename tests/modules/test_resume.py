"""A run that is cut off anywhere and resumed ends where one that was not does, to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lit_edm.cache import DiskCache, MemoryCache
from lit_edm.callbacks import ExponentialMovingAverage, FreezeEmbeddings, RetractEmbeddings, TrainDuring
from lit_edm.data import AspectBuckets, CaptionedImagesDataModule, ClassImages, TeacherPrior
from lit_edm.edm import AdaptiveNoise, EDMLoss, LearnedWeighting, MinSNRWeighting, SNRWeighting, UniformTimesteps
from lit_edm.modules import EDMModule, SDXLModule
from lit_edm.optim import GroupedProdigy, WarmupSchedule
from lit_edm.sdxl import DoRA, LoRA

Make = Callable[..., Any]
STEPS = 6


class Losses(Callback):
    """Keeps what was logged, by the batches trained with before; may break off before or after a batch."""

    def __init__(self, breaks: tuple[str, int] | None = None) -> None:
        self.logged: dict[int, dict[str, float]] = {}
        self.breaks = breaks

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        self._break(trainer, "in")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        stepped = not loop._should_accumulate()  # other batches show the rates of the step before
        self.logged[loop.total_batch_idx] = logged if stepped else {"train/loss": logged["train/loss"]}
        self._break(trainer, "after")

    def _break(self, trainer: Trainer, where: str) -> None:
        if self.breaks == (where, trainer.fit_loop.epoch_loop.total_batch_idx):
            raise RuntimeError("broken off")


def pivotal(base: Path, images: Path, name: str) -> tuple[SDXLModule, CaptionedImagesDataModule, list[Callback]]:
    """Tokens until the pivot, text encoders for a while, Prodigy, class images, disk caches, buckets, averages."""
    torch.manual_seed(len(name))  # nothing may follow from it
    module = SDXLModule(
        str(base),
        tokens={"TOK": 2},
        adapter=LoRA(rank=2, dropout=0.2),
        text_encoder_adapter=LoRA(rank=2),
        loss=EDMLoss(UniformTimesteps(), MinSNRWeighting(sigma_data=1.0), noise_offset=0.1),
        optimizer=lambda groups: GroupedProdigy(groups, d0=1e-3),
        lr_scheduler=lambda optimizer: WarmupSchedule(optimizer, warmup_steps=2),
        text_cache=DiskCache(str(images / "texts")),
    )
    data = CaptionedImagesDataModule(
        str(images / "instance"),
        resolution=16,
        buckets=AspectBuckets(step=4),
        instance_prompt="an icon of TOK",
        prior=ClassImages(root=str(images / "class"), prompt="an icon"),
        latent_cache=DiskCache(str(images / "latents")),
        random_crop=True,
        random_flip=True,
        batch_size=2,
        num_workers=1,
    )
    phases = [FreezeEmbeddings(0.5), TrainDuring("text_encoders", stop=2), TrainDuring("unet", start=0.2)]
    return module, data, [*phases, ExponentialMovingAverage(20.0, None)]


def learned(base: Path, images: Path, name: str) -> tuple[SDXLModule, CaptionedImagesDataModule, list[Callback]]:
    """DoRA, AdamW, learned weighting and noise levels, the base as a teacher, memory caches, captions that vary."""
    torch.manual_seed(len(name))
    module = SDXLModule(
        str(base),
        tokens={"TOK": 1},
        adapter=DoRA(rank=2),
        loss=EDMLoss(AdaptiveNoise(UniformTimesteps(), num_bins=10), LearnedWeighting(SNRWeighting())),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        text_cache=MemoryCache(),
    )
    data = CaptionedImagesDataModule(
        str(images / "instance"),
        resolution=16,
        instance_prompt="an icon of TOK, red, green, blue",
        prior=TeacherPrior("an icon"),
        latent_cache=MemoryCache(),
        caption_dropout=0.2,
        shuffle_tags=True,
        batch_size=3,
    )
    return module, data, [FreezeEmbeddings(0.5), RetractEmbeddings(0.1), ExponentialMovingAverage(20.0)]


RECIPES = {"pivotal": pivotal, "learned": learned}


def run(made: Any, ckpt_path: Path | None = None, **settings: Any) -> dict[int, dict[str, float]]:
    """Trains and returns what was logged."""
    seed_everything(3, verbose=False)
    module, data, callbacks = made
    losses = Losses(settings.pop("breaks", None))
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keepers = settings.pop("keepers")
    trainer = Trainer(
        callbacks=[*callbacks, losses, *keepers], **({"max_steps": STEPS, "gradient_clip_val": 1.0} | quiet | settings)
    )
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    except RuntimeError as error:
        assert str(error) == "broken off"  # noqa: PT017 (whether it is raised is what callers choose)
    return losses.logged


def keeper(folder: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, filename="{step}", **settings)


def at(folder: Path, step: int) -> dict[str, Any]:
    return torch.load(folder / f"step={step}.ckpt", weights_only=True)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Asserts that nested states are equal to the last bit, but for checkpoints' paths and Lightning's counters."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"hyper_parameters", "loops"}:
            if not str(key).startswith(("ModelCheckpoint", "OnException")):
                assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{index}")
    elif isinstance(a, torch.Tensor):
        assert a.equal(b), where
    else:
        assert a == b, where


@pytest.mark.parametrize(("recipe", "accumulate"), [("pivotal", 2), ("learned", 1)])
def test_from_every_step(tiny: Path, images: Path, recipe: str, accumulate: int) -> None:
    """Before, at and after the pivot, within epochs and at their ends."""
    make = RECIPES[recipe]
    how = {"accumulate_grad_batches": accumulate}
    whole = run(make(tiny, images, "whole"), keepers=[keeper(images / "whole")], **how)
    end = at(images / "whole", STEPS)
    for step in range(1, STEPS):
        start = images / "whole" / f"step={step}.ckpt"
        rest = run(make(tiny, images, "r" * step), start, keepers=[keeper(images / f"from{step}")], **how)
        assert rest == {batch: logged for batch, logged in whole.items() if batch in rest}, step
        assert max(rest) == max(whole)
        assert_same(at(images / f"from{step}", STEPS), end, f"resumed at {step}")


@pytest.mark.parametrize(("recipe", "where"), [("pivotal", "after"), ("learned", "in"), ("learned", "after")])
def test_from_any_batch_between_two_steps(tiny: Path, images: Path, recipe: str, where: str) -> None:
    """What an error, a signal or a time limit leaves: batches whose gradients are lost are trained with again."""
    make, how = RECIPES[recipe], {"accumulate_grad_batches": 3}
    whole = run(make(tiny, images, "whole"), keepers=[keeper(images / "whole")], **how)
    for batch in (1, 4, 6):
        folder = images / f"{where}{batch}"
        run(make(tiny, images, "first"), keepers=[OnExceptionCheckpoint(folder, "cut")], breaks=(where, batch), **how)
        rest = run(make(tiny, images, "rest"), folder / "cut.ckpt", keepers=[keeper(folder)], **how)
        assert rest == {number: logged for number, logged in whole.items() if number in rest}
        assert_same(at(folder, STEPS), at(images / "whole", STEPS), f"{where} {batch}")


@pytest.mark.parametrize("stop", [2, 4])
def test_a_run_that_max_steps_ended_goes_on(tiny: Path, images: Path, stop: int) -> None:
    """In mid-epoch or at its end, whether the checkpoint was written in the step or after training had ended."""
    module, data, _ = learned(tiny, images, "whole")
    whole = run((module, data, []), keepers=[keeper(images / "whole")])
    for name, settings in {"step": {"every_n_train_steps": 1}, "end": {"save_on_train_epoch_end": True}}.items():
        module, data, _ = learned(tiny, images, "first")
        keep = ModelCheckpoint(images / name, filename="cut", **settings)
        run((module, data, []), keepers=[keep], max_steps=stop)
        module, data, _ = learned(tiny, images, "rest")
        rest = run((module, data, []), images / name / "cut.ckpt", keepers=[keeper(images / name)])
        assert rest == {number: logged for number, logged in whole.items() if number >= stop}, name
        assert_same(at(images / name, STEPS), at(images / "whole", STEPS), name)


def test_a_denoiser_of_images(pixels: Make, patches: Make, tmp_path: Path) -> None:
    def make() -> tuple[EDMModule, Any, list[Callback]]:
        module = pixels(label_dropout=0.2, loss=EDMLoss(weighting=LearnedWeighting()))
        return module, patches(batch_size=2), [ExponentialMovingAverage(20.0)]

    whole = run(make(), keepers=[keeper(tmp_path / "whole")])
    for step in range(1, STEPS):
        start = tmp_path / "whole" / f"step={step}.ckpt"
        rest = run(make(), start, keepers=[keeper(tmp_path / f"from{step}")])
        assert rest == {batch: logged for batch, logged in whole.items() if batch >= step}
        assert_same(at(tmp_path / f"from{step}", STEPS), at(tmp_path / "whole", STEPS))


class EpochEnds(Callback):
    """Notes the steps at which epochs end, and saves as the next ones begin."""

    def __init__(self, folder: Path) -> None:
        self.steps: list[int] = []
        self.folder = folder

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"begins={trainer.current_epoch}.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize("validates", [True, False])
def test_from_the_end_of_an_epoch(pixels: Make, patches: Make, tmp_path: Path, validates: bool) -> None:
    """Where Lightning saves after an epoch, and has counted it already; epochs have four batches."""

    def fit(name: str, max_steps: int, start: Path | None = None) -> dict[int, dict[str, float]]:
        ends = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        ended[name] = EpochEnds(tmp_path / name)
        made = pixels(), patches(batch_size=2, held_out=4 / 11), [ExponentialMovingAverage(20.0), ended[name]]
        how = {"max_steps": max_steps, "limit_val_batches": 1 if validates else 0}
        return run(made, start, keepers=[keeper(tmp_path / name), ends], **how)

    ended: dict[str, EpochEnds] = {}
    whole = fit("whole", 10)
    assert ended["whole"].steps == [4, 8, 10]
    for name, end in {"epoch=0": 4, "epoch=1": 8, "begins=1": 4, "begins=2": 8}.items():
        rest = fit(name, 10, tmp_path / "whole" / f"{name}.ckpt")
        assert rest == {batch: logged for batch, logged in whole.items() if batch >= end}
        assert_same(at(tmp_path / name, 10), at(tmp_path / "whole", 10), name)
        assert ended[name].steps == [step for step in (8, 10) if step > end], "no epoch ends twice"
    fit("first", 4)
    rest = fit("extended", 10, tmp_path / "first" / "epoch=0.ckpt")
    assert rest == {batch: logged for batch, logged in whole.items() if batch >= 4}
    assert_same(at(tmp_path / "extended", 10), at(tmp_path / "whole", 10))
