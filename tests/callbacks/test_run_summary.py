"""The parts that count memory and files have tests of their own beside this."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lit_edm.cache import DiskCache, MemoryCache
from lit_edm.callbacks import (
    ExponentialMovingAverage,
    FreezeEmbeddings,
    RunSummary,
    SampleSheet,
    SaveAdapter,
    TrainDuring,
    ValidationImages,
)
from lit_edm.callbacks.run_memory import too_large, training_memory
from lit_edm.callbacks.run_summary import laid_out
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.data.buckets import AspectBuckets
from lit_edm.data.prior import ClassImages, TeacherPrior
from lit_edm.edm import EDMLoss, LearnedWeighting, SNRWeighting, UniformTimesteps
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.optim import GroupedProdigy, WarmupSchedule
from lit_edm.sdxl import FullFinetune, LoKr, LoRA
from lit_edm.sdxl.memory import TrainingMemory

Make = Callable[..., Any]


class SlowWorkError(Exception):
    """A run got as far as to render and encode images."""


class Encodes(SDXLModule):
    """Ends there."""

    def on_fit_start(self) -> None:
        raise SlowWorkError


def told(trainer: Trainer, module: LightningModule, data: Any, folder: Path) -> dict[str, str]:
    """Starts a run, and returns the facts of its summary by name."""
    with pytest.raises(SlowWorkError):
        trainer.fit(module, data)
    return facts((folder / "summary.txt").read_text())


def facts(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line in text.splitlines()[1:]:
        name = line[2:12].strip() or list(found)[-1]
        found[name] = f"{found.get(name, '')} {line[12:].strip()}".strip()
    return found


def test_all_that_a_run_of_sdxl_is(tiny: Path, icons: Path, tmp_path: Path, trainer: Make) -> None:
    module = Encodes(
        str(tiny),
        tokens={"TOK": 2},
        adapter=LoRA(rank=2),
        text_encoder_adapter=LoRA(rank=1),
        loss=EDMLoss(UniformTimesteps(), LearnedWeighting(SNRWeighting())),
        optimizer=lambda groups: GroupedProdigy(groups),
        lr_scheduler=lambda optimizer: WarmupSchedule(optimizer, 2),
        text_encoders_lr=0.5,
        text_cache=MemoryCache(),
    )
    images = CaptionedImagesDataModule(
        icons,
        repeats=2,
        prior=TeacherPrior("an icon"),
        resolution=64,
        batch_size=3,
        latent_cache=DiskCache(str(tmp_path / "latents")),
        random_flip=True,
        val_root=validation_set(icons, tmp_path),
    )
    callbacks = [
        FreezeEmbeddings(0.5),
        TrainDuring("text_encoders", 3, 7),
        ExponentialMovingAverage(),
        ValidationImages(["a"], every_n_steps=5, resolution=16),
        SaveAdapter(),
        ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=4, save_last=True),
        RunSummary(),
    ]
    training = trainer(*callbacks, max_steps=20, accumulate_grad_batches=2, enable_checkpointing=True)
    found = told(training, module, images, tmp_path)
    counts = {name: sum(p.numel() for p in group) for name, group in module.parameter_groups().items()}
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    groups = [f"{name} {count:,}" for name, count in [*counts.items(), ("loss", trained - sum(counts.values()))]]
    assert found["images"] == "22; 22 of a prior; 1 held out; 88 examples an epoch"
    assert found["sizes"] == "64 x 64: 44"
    assert found["steps"] == "20, 6 (3 a batch x 2 batches) images each, 30 batches an epoch, 2 epochs"
    assert found["trained"] == f"{', '.join(groups)} values; {frozen:,} frozen"
    assert found["optimizer"] == "GroupedProdigy(lr=1, 0.5), WarmupSchedule, 32-true"
    assert found["phases"] == "unet 0-20, text_encoders 3-7, embeddings 0-10, the pivot is step 10"
    assert found["saved"] == "pictures before, every 5 steps, and after training; checkpoints every 4 steps"
    assert "latents, 44 of 44 to be encoded, 1.4 MiB in" in found["caches"]
    assert re.search(r"texts, \d+ of \d+ to be encoded, once nothing learns from them, .* in memory", found["caches"])
    assert re.match(r"checkpoints, 3 of .* KiB, .* KiB in .*/checkpoints adapters, 6 of ", found["written"])
    assert re.match(r"about .* MiB of .* GiB that are free", found["disk"])
    memory = r"about .* frozen, .* trained, .* gradients, .* optimizer, .* average, .* MiB activations"
    assert re.match(memory, found["memory"])
    assert all(len(line) <= 110 for line in (tmp_path / "summary.txt").read_text().splitlines())


def validation_set(icons: Path, folder: Path) -> Path:
    """Returns a folder with one image."""
    (folder / "held_out").mkdir()
    picture = next(icons.glob("*.webp"))
    (folder / "held_out" / picture.name).write_bytes(picture.read_bytes())
    (folder / "held_out" / f"{picture.stem}.txt").write_text("an icon")
    return folder / "held_out"


def test_what_is_kept_already_is_not_made_again(tiny: Path, icons: Path, tmp_path: Path, trainer: Make) -> None:
    def images() -> CaptionedImagesDataModule:
        return CaptionedImagesDataModule(icons, resolution=16, latent_cache=DiskCache(str(tmp_path / "latents")))

    def module(kind: type[SDXLModule]) -> SDXLModule:
        return kind(str(tiny), adapter=LoRA(rank=2), text_cache=DiskCache(str(tmp_path / "texts")))

    before = told(trainer(RunSummary()), module(Encodes), images(), tmp_path)
    assert "latents, 22 of 22 to be encoded, 44.0 KiB in" in before["caches"]
    assert "texts, 22 of 22 to be encoded, 534 KiB in" in before["caches"]
    trainer(max_steps=1).fit(module(SDXLModule), images())
    sizes = [path.stat().st_size for path in (tmp_path / "latents").rglob("*.safetensors")]
    assert len(sizes) == 22
    assert sum(sizes) == pytest.approx(44 * 1024, rel=0.1), "but for the headers"
    after = told(trainer(RunSummary()), module(Encodes), images(), tmp_path)
    assert "latents, 0 of 22 to be encoded, 0 bytes in" in after["caches"]
    assert "texts, 0 of 22 to be encoded, 0 bytes in" in after["caches"]


def test_class_images_to_be_rendered(tiny: Path, icons: Path, tmp_path: Path, trainer: Make) -> None:
    prior = ClassImages(str(tmp_path / "class"), "an icon", num_images=3)
    images = CaptionedImagesDataModule(icons, resolution=16, prior=prior, latent_cache=MemoryCache())
    found = told(trainer(RunSummary()), Encodes(str(tiny)), images, tmp_path)
    assert found["images"] == "22; 3 of a prior, 3 of them to be rendered; 44 examples an epoch"
    assert found["caches"].startswith("latents, 25 of 25 to be encoded, 50.0 KiB in memory class images, 3 to be")


def test_many_sizes_are_folded(tiny: Path, icons: Path, tmp_path: Path, trainer: Make, monkeypatch: Any) -> None:
    sizes = {(16 + 2 * number, 16): number + 1 for number in range(9)}
    summary = CaptionedImagesDataModule.summary
    monkeypatch.setattr(CaptionedImagesDataModule, "summary", lambda self: {**summary(self), "sizes": sizes})
    images = CaptionedImagesDataModule(icons, resolution=16, buckets=AspectBuckets(step=8))
    found = told(trainer(RunSummary()), Encodes(str(tiny)), images, tmp_path)
    assert found["sizes"].startswith("32 x 16: 9, 30 x 16: 8,")
    assert found["sizes"].endswith(", 3 more: 6")


def test_a_run_of_pixels(pixels: Make, patches: Make, trainer: Make, tmp_path: Path) -> None:
    trainer(RunSummary(), SampleSheet(2, samples=1, num_steps=2), max_epochs=3, max_steps=-1).fit(pixels(), patches())
    found = facts((tmp_path / "summary.txt").read_text())
    assert list(found) == ["steps", "trained", "optimizer", "saved", "memory"]
    assert found["steps"] == "9, 3 images each, 3 batches an epoch, 3 epochs"
    assert re.fullmatch(r"all [\d,]+ values; 0 frozen", found["trained"])
    assert "activations" in found["memory"]


def test_modules_and_data_of_others(trainer: Make, tmp_path: Path) -> None:
    trainer(RunSummary(), max_steps=-1, max_epochs=-1, max_time={"seconds": 1}).fit(BoringModel(), BoringDataModule())
    text = (tmp_path / "summary.txt").read_text()
    found = facts(text)
    assert text.startswith(f"BoringModel in {tmp_path}\n")
    assert found["steps"] == "without end, 64 batches an epoch"
    assert found["trained"] == "all 66 values; 0 frozen"
    assert found["memory"].startswith("about 528 bytes without activations: 264 bytes trained")


def test_a_run_without_room_ends_before_anything_slow(
    tiny: Path, icons: Path, tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr("lit_edm.callbacks.disk_room.shutil.disk_usage", lambda path: usage)
    images = CaptionedImagesDataModule(icons, resolution=64, latent_cache=DiskCache(str(tmp_path / "latents")))
    with pytest.raises(InputError) as refusal:
        trainer(RunSummary()).fit(Encodes(str(tiny)), images)
    assert str(refusal.value) == (
        f"{tmp_path}/latents: this run needs about 704 KiB on its disk, most of it for latents, and 97.7 KiB are free: "
        "free some, or name another folder in data.init_args.latent_cache"
    )


def test_checkpoints_that_cannot_be_written_are_told_before_weights_are_loaded(
    tiny: Path, icons: Path, tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SDXLModule, "configure_model", lambda self: pytest.fail("weights would be loaded now"))
    (tmp_path / "checkpoints").write_text("")
    training = trainer(RunSummary(), ModelCheckpoint(tmp_path / "checkpoints"), enable_checkpointing=True)
    with pytest.raises(InputError, match="checkpoints is a file, where this run is to have a folder"):
        training.fit(SDXLModule(str(tiny)), CaptionedImagesDataModule(icons, resolution=16))


@pytest.mark.parametrize("named", ["latents", "texts", "adapter", "images"])
def test_other_folders_that_cannot_be_written(
    tiny: Path, icons: Path, tmp_path: Path, trainer: Make, named: str
) -> None:
    (tmp_path / named).write_text("")
    module = Encodes(str(tiny), text_cache=DiskCache(str(tmp_path / "texts")))
    images = CaptionedImagesDataModule(icons, resolution=16, latent_cache=DiskCache(str(tmp_path / "latents")))
    training = trainer(RunSummary(), SaveAdapter(), ValidationImages(["a"], resolution=16))
    with pytest.raises(InputError, match=f"{named} is a file"):
        training.fit(module, images)


def test_a_run_with_little_room_is_warned(
    tiny: Path, icons: Path, tmp_path: Path, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("lit_edm.callbacks.disk_room.shutil.disk_usage", lambda path: usage)
    images = CaptionedImagesDataModule(icons, resolution=64, latent_cache=DiskCache(str(tmp_path / "latents")))
    with pytest.warns(UserWarning, match=r"latents: about 704 KiB of 977 KiB that are free; other programs"):
        told(trainer(RunSummary()), Encodes(str(tiny)), images, tmp_path)


def test_memory_of_a_run(tiny: Path, icons: Path, trainer: Make) -> None:
    module = Encodes(str(tiny), adapter=LoRA(rank=2), text_cache=MemoryCache())
    images = CaptionedImagesDataModule(icons, resolution=16, batch_size=2, latent_cache=MemoryCache())
    training = trainer(ExponentialMovingAverage())
    with pytest.raises(SlowWorkError):
        training.fit(module, images)
    memory = training_memory(training, module)
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    unet = sum(p.nbytes for p in module.denoiser.parameters() if not p.requires_grad)
    assert memory.frozen == unet, "VAE and text encoders have left"
    assert (memory.trained, memory.gradients, memory.average) == (trained, trained, trained)
    assert memory.optimizer == 2 * trained
    assert memory.activations
    images.batch_size = 6
    more = training_memory(training, module)
    assert more.activations == pytest.approx(3 * memory.activations, rel=0.02)
    images.latent_cache, module.text_cache = None, None
    everything = training_memory(training, module)
    assert everything.frozen == sum(p.nbytes for p in module.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    ("settings", "remedies"),
    [
        ({}, "set model.init_args.gradient_checkpointing to true; lower data.init_args.batch_size, and raise"),
        (
            {"gradient_checkpointing": 1.0},
            "lower model.init_args.gradient_checkpointing, or set it to true; lower data.",
        ),
        ({"gradient_checkpointing": True, "batch_size": 1}, "give data.init_args.latent_cache, so that the VAE leaves"),
        (
            {"gradient_checkpointing": True, "batch_size": 1, "latent_cache": MemoryCache()},
            "set model.init_args.quantization to int8",
        ),
        (
            {
                "gradient_checkpointing": True,
                "quantization": "int8",
                "batch_size": 1,
                "latent_cache": MemoryCache(),
            },
            "train less of it, or on smaller images",
        ),
    ],
)
def test_a_device_that_is_too_small(tiny: Path, icons: Path, settings: dict[str, Any], remedies: str) -> None:
    memory = TrainingMemory(frozen=5 * 2**30, trained=2**29, optimizer=2**30, average=0, activations=2**30)
    own = {"batch_size": 4, "latent_cache": None} | settings
    of_module = {key: own.pop(key) for key in ("gradient_checkpointing", "quantization") if key in own}
    module, images = SDXLModule(str(tiny), **of_module), CaptionedImagesDataModule(icons, **own)
    warning = too_large(memory, 6 * 2**30, module, images)
    assert warning is not None
    assert warning.startswith(f"training takes about 8.0 GiB, and the device has 6.0: {remedies}")
    assert too_large(memory, 9 * 2**30, module, images) is None


def test_room_for_activations_is_advised(tiny: Path) -> None:
    memory = TrainingMemory(frozen=5 * 2**30, trained=2**29, optimizer=2**30, average=0, activations=7 * 2**30)
    warning = too_large(memory, 12 * 2**30, SDXLModule(str(tiny)), None)
    assert warning is not None
    assert "gradient_checkpointing to true, or to 4.0, the GiB that are left for activations" in warning


def test_blocks_that_are_computed_again_are_told(tiny: Path, icons: Path, tmp_path: Path, trainer: Make) -> None:
    module = Encodes(str(tiny), adapter=LoRA(rank=2), gradient_checkpointing=0.0005)
    found = told(trainer(RunSummary()), module, CaptionedImagesDataModule(icons, resolution=16), tmp_path)
    assert module.computed_again
    assert f"({len(module.computed_again)} blocks of the UNet are computed again, 0.00 TFLOP" in found["memory"]


def test_all_weights_of_the_base_are_exported_where_they_are_trained(
    tiny: Path, icons: Path, tmp_path: Path, trainer: Make
) -> None:
    module = Encodes(str(tiny), adapter=FullFinetune(("mid_block",)))
    found = told(
        trainer(RunSummary(), SaveAdapter()), module, CaptionedImagesDataModule(icons, resolution=16), tmp_path
    )
    size = sum(4 * p.numel() for p in module.denoiser.parameters())
    assert found["written"] == f"adapters, 1 of {size / 2**20:.1f} MiB, {size / 2**20:.1f} MiB in {tmp_path}/adapter"


def test_a_summary_changes_nothing(tiny: Path, icons: Path, tmp_path: Path, trainer: Make) -> None:
    """Neither what is trained, by LoKr that draws in its forward pass, nor where in an epoch a run is resumed."""

    def run(*callbacks: Callback, resume: Path | None = None, **settings: Any) -> SDXLModule:
        seed_everything(3, verbose=False)
        module = SDXLModule(str(tiny), tokens={"TOK": 1}, adapter=LoKr(rank=2, dropout=0.3))
        images = CaptionedImagesDataModule(icons, resolution=16, batch_size=8, random_flip=True)
        part = trainer(TrainDuring("embeddings", stop=4), *callbacks, **({"max_epochs": 2, "max_steps": -1} | settings))
        part.fit(module, images, ckpt_path=resume)
        part.save_checkpoint(tmp_path / "last.ckpt")
        return module

    whole = run()
    run(RunSummary(), max_steps=2)
    rest = run(RunSummary(), resume=tmp_path / "last.ckpt")
    trained = [name for name, parameter in whole.named_parameters() if parameter.requires_grad]
    assert all(rest.get_parameter(name).equal(whole.get_parameter(name)) for name in trained)


def test_processes_end_together(pixels: Make, patches: Make, trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first alone looks, and the others hear of it."""

    def refuse(*_: Any) -> str:
        raise InputError("there is no room")

    monkeypatch.setattr(RunSummary, "summary", refuse)
    training = trainer(RunSummary(), strategy="ddp_fork", devices=2)
    with pytest.raises(Exception, match="there is no room") as failure:
        training.fit(pixels(), patches())
    assert "there is no room" in str(failure.value)


def test_layout() -> None:
    text = laid_out("A run", {"one": ["x", "", "y"], "two": [""], "three": ["long " * 30]})
    assert text.splitlines()[:3] == ["A run", "  one       x", "            y"]
    assert text.splitlines()[3].startswith("  three     long long")
    assert text.splitlines()[4].startswith("            long")
    assert torch.tensor([len(line) for line in text.splitlines()]).max() <= 110
