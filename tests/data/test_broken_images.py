"""Images that break while a run reads them: it stops and names them, or others stand in for them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor

from lit_edm.batch import Batch
from lit_edm.cache import DiskCache, MemoryCache, TensorCache
from lit_edm.cli import main
from lit_edm.data import CaptionedImagesDataModule, ClassImages, TeacherPrior
from lit_edm.data.dataset import TrainingImages
from lit_edm.data.draws import Draw
from lit_edm.data.images import ImageFile
from lit_edm.data.items import Item
from lit_edm.data.transforms import RandomViews
from lit_edm.errors import InputError

Save = Callable[..., Path]
Make = Callable[..., Any]
COUNT = 6


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def forbid(path: Path) -> None:
    path.unlink()
    path.mkdir()  # which not even root can read as a file


BREAK = [delete, truncate, empty, forbid]


def colour(number: int) -> tuple[int, int, int]:
    return 40 * number, 0, 0


@pytest.fixture
def items(save: Save) -> list[Item]:
    """Items of one colour each, which their captions number."""
    paths = [save(f"{number}.png", Image.new("RGB", (24, 16), colour(number))) for number in range(COUNT)]
    return [Item(ImageFile(path), str(number), (16, 24), (16, 16)) for number, path in enumerate(paths)]


def draws(item: int, count: int = 20) -> list[Draw]:
    return [Draw(item, seed, 0.5, count) for seed in range(count)]


def numbers(batch: Batch) -> list[int]:
    """Which images a batch shows; they and their captions agree."""
    shown = ((batch["image"][:, 0].mean((1, 2)) + 1) * 127.5 / 40).round().int().tolist()
    assert [str(number) for number in shown] == batch["caption"]
    return shown


@pytest.mark.parametrize("broken", BREAK)
def test_stand_ins_follow_from_the_draw_alone(items: list[Item], broken: Callable[[Path], None]) -> None:
    kinds = [[0, 1, 2], [3, 4, 5]]
    data, whole = TrainingImages(items, RandomViews(True), kinds), TrainingImages(items, RandomViews(True))
    broken(items[1].image.path)  # type: ignore[attr-defined]
    batch = data[draws(1)]
    assert set(numbers(batch)) == {0, 2}
    assert (batch.get("weight", torch.ones(1)).unique().tolist(), batch.get("images")) == ([0.5], 20)
    for number, draw in zip(numbers(batch), draws(1), strict=True):
        alone = TrainingImages(items, RandomViews(True), kinds)[[draw]]
        assert numbers(alone) == [number]
        same = whole[[draw._replace(item=number)]]
        assert all(alone[key].equal(same[key]) for key in ("image", "crop_top_left", "original_size"))


def test_who_is_whole_is_shown(items: list[Item]) -> None:
    data, whole = TrainingImages(items, RandomViews(True), [range(COUNT)]), TrainingImages(items, RandomViews(True))
    delete(items[1].image.path)  # type: ignore[attr-defined]
    assert data[draws(4)]["image"].equal(whole[draws(4)]["image"])


def test_warns_once_of_each_image(items: list[Item], caplog: pytest.LogCaptureFixture) -> None:
    data = TrainingImages(items, RandomViews(), [range(COUNT)])
    for number in (1, 3):
        delete(items[number].image.path)  # type: ignore[attr-defined]
    for _ in range(3):
        data[draws(1)]
        data[draws(3)]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    for line, number in zip(lines, (1, 3), strict=True):
        assert line.startswith(f"{items[number].image.name} cannot be read as an image (")
        assert line.endswith("): delete it or save it again; until then others of its size and kind stand in for it")
        assert "\n" not in line


def test_images_come_back(items: list[Item]) -> None:
    data = TrainingImages(items, RandomViews(), [range(COUNT)])
    path = items[1].image.path  # type: ignore[attr-defined]
    path.rename(path.with_suffix(".away"))
    assert 1 not in numbers(data[draws(1)])
    path.with_suffix(".away").rename(path)
    assert set(numbers(data[draws(1)])) == {1}


def test_stops_if_none_of_the_kind_can_be_read(items: list[Item]) -> None:
    data = TrainingImages(items, RandomViews(), [[0, 1], [2, 3, 4, 5]])
    for number in (0, 1):
        delete(items[number].image.path)  # type: ignore[attr-defined]
    assert set(numbers(data[draws(2)])) == {2}
    with pytest.raises(InputError, match=r"0\.png cannot be read, nor can any image of its size and kind that could "):
        data[draws(0)]


def test_stops_without_kinds(items: list[Item]) -> None:
    delete(items[1].image.path)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"1\.png cannot be read as an image"):
        TrainingImages(items, RandomViews())[draws(1)]


def test_masks(items: list[Item], save: Save) -> None:
    """An image whose mask is broken is left out, and those that stand in for it have one."""
    masks = [save(f"{number}.mask.png", Image.new("L", (24, 16), 200)) for number in range(3)]
    masked = [replace(item, mask=ImageFile(mask)) for item, mask in zip(items, masks, strict=False)]
    data = TrainingImages([*masked, *items[3:]], RandomViews(), [range(COUNT)])
    truncate(masks[0])
    delete(items[4].image.path)  # type: ignore[attr-defined]
    assert set(numbers(data[draws(0)])) == {1, 2}
    assert data[draws(0)].get("mask", torch.ones(1)).lt(1).all()
    assert set(numbers(data[draws(4)])) == {3, 5}


class Reader(LightningModule):
    """Fills the cache as training modules do, notes captions, and breaks files at a step."""

    def __init__(self, at: int = 0, broken: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.at, self.broken = at, broken
        self.at_step_8: Callable[[], Any] = lambda: None
        self.seen: list[tuple[str, float, bool]] = []
        self.value = torch.nn.Parameter(torch.zeros(3))

    def on_fit_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        data.fill_cache(lambda pixels: torch.nn.functional.avg_pool2d(pixels, 8), "vae")
        if self.at == 0:
            self.broken()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert "weight" in batch
        weight, teacher = batch["weight"], batch.get("teacher", [False] * len(batch["caption"]))
        self.seen += zip(batch["caption"], weight.tolist(), teacher, strict=True)
        shown = batch["moments"] if "moments" in batch else batch["image"]
        losses = (self.value - shown.mean((2, 3))).square().mean(1)
        if self.trainer.global_step + 1 == self.at:
            self.broken()
        return (losses * weight).mean()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == 8:
            self.at_step_8()

    def validation_step(self, batch: Batch, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def folder(tmp_path: Path, save: Save) -> Path:
    """Square images, numbered by their captions."""
    for number in range(COUNT):
        save(f"images/{number}.png", Image.new("RGB", (16, 16), colour(number)))
        (tmp_path / "images" / f"{number}.txt").write_text(str(number))
    return tmp_path / "images"


@pytest.fixture
def minute() -> Iterator[None]:
    """Ends a test that hangs."""

    def end(*_: Any) -> None:
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("minute")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", BREAK)
def test_a_run_stops_and_names_the_image(
    folder: Path, trainer: Make, workers: int, broken: Callable[[Path], None]
) -> None:
    data = CaptionedImagesDataModule(folder, resolution=16, batch_size=2, num_workers=workers)
    module = Reader(2, lambda: broken(folder / "3.png"))
    with pytest.raises(InputError, match=r"3\.png cannot be read as an image \(.*\): delete it or save it again$"):
        trainer(max_steps=20).fit(module, data)
    assert module.seen


@pytest.mark.usefixtures("minute")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("broken", BREAK)
def test_a_run_skips_the_image(folder: Path, trainer: Make, workers: int, broken: Callable[[Path], None]) -> None:
    data = CaptionedImagesDataModule(folder, resolution=16, batch_size=2, num_workers=workers, broken_images="skip")
    module = Reader(2, lambda: broken(folder / "3.png"))
    trainer(max_steps=20).fit(module, data)
    assert len(module.seen) == 40
    assert "3" not in [caption for caption, _, _ in module.seen[-20:]]


@pytest.mark.usefixtures("minute")
@pytest.mark.parametrize("setting", ["stop", "skip"])
def test_all_images_gone(folder: Path, trainer: Make, setting: Any) -> None:
    """As when a network drive goes."""
    data = CaptionedImagesDataModule(folder, resolution=16, num_workers=2, broken_images=setting)
    with pytest.raises(InputError, match=r"\d\.png cannot be read"):
        trainer(max_steps=20).fit(Reader(1, lambda: folder.rename(folder.with_name("away"))), data)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_has_the_same_stand_ins(folder: Path, trainer: Make, workers: int) -> None:
    """Where the same images are broken."""

    def run(workers: int, resume: Path | None = None) -> list[Any]:
        data = CaptionedImagesDataModule(
            folder, resolution=16, batch_size=2, num_workers=workers, random_flip=True, broken_images="skip"
        )
        module, part = Reader(0, lambda: (folder / "3.png").rename(folder / "away")), trainer(max_steps=14)
        if resume is None:
            module.at_step_8 = lambda: part.save_checkpoint(folder / ".last.ckpt")
        part.fit(module, data, ckpt_path=resume)
        (folder / "away").rename(folder / "3.png")
        return module.seen

    assert run(0)[16:] == run(workers, folder / ".last.ckpt")


@pytest.mark.parametrize("prior", ["class images", "teacher"])
def test_kinds_are_kept_apart(folder: Path, save: Save, trainer: Make, prior: str) -> None:
    """An instance stands in for an instance, with its weight, and a class image for a class image."""
    for number in range(3):
        save(f"class/{number}.png", Image.new("RGB", (16, 16), "white"))
    classes = {"class images": ClassImages(str(folder.parent / "class"), "a class", 0.25)}
    data = CaptionedImagesDataModule(
        folder,
        resolution=16,
        batch_size=4,
        prior=classes.get(prior, TeacherPrior("a class", 0.25)),
        broken_images="skip",
    )
    module = Reader(0, lambda: [delete(folder / f"{number}.png") for number in range(4)])
    trainer(max_steps=6).fit(module, data)
    assert {caption for caption, _, _ in module.seen} == {"4", "5", "a class"}
    assert [weight for _, weight, _ in module.seen] == [
        0.25 if caption == "a class" else 1.0 for caption, _, _ in module.seen
    ]
    assert sum(caption == "a class" for caption, _, _ in module.seen) == 12
    taught = [caption == "a class" and prior == "teacher" for caption, _, _ in module.seen]
    assert [teacher for _, _, teacher in module.seen] == taught


@pytest.mark.usefixtures("minute")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_caches_need_no_images_but_masks(
    folder: Path, tmp_path: Path, save: Save, write_metadata: Make, trainer: Make, workers: int, kind: str
) -> None:
    for number in range(COUNT):
        save(f"images/masks/{number}.png", Image.new("L", (16, 16), 200))
        (folder / f"{number}.txt").unlink()
    rows = [{"file_name": f"{n}.png", "text": str(n), "mask": f"masks/{n}.png"} for n in range(COUNT)]
    write_metadata(*rows).rename(folder / "metadata.jsonl")

    def run(setting: Any, *broken: str) -> Reader:
        caches: dict[str, TensorCache] = {"memory": MemoryCache(), "disk": DiskCache(str(tmp_path / "cache"))}
        data = CaptionedImagesDataModule(
            folder,
            resolution=16,
            mask_column="mask",
            num_workers=workers,
            broken_images=setting,
            latent_cache=caches[kind],
        )
        kept = {name: (folder / name).read_bytes() for name in broken}
        module = Reader(0, lambda: [delete(folder / name) for name in broken])
        try:
            trainer(max_steps=12).fit(module, data)
        finally:
            for name, content in kept.items():
                (folder / name).write_bytes(content)
        return module

    assert {caption for caption, _, _ in run("stop", "3.png").seen} == set("012345")
    assert {caption for caption, _, _ in run("skip", "masks/3.png").seen} == set("01245")
    with pytest.raises(InputError, match=r"masks/3\.png cannot be read"):
        run("stop", "masks/3.png")


def test_what_is_cached_breaks(folder: Path, tmp_path: Path, trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
    def breaks() -> None:
        sorted((tmp_path / "cache").rglob("*.safetensors"))[0].unlink()

    cache = DiskCache(str(tmp_path / "cache"))
    data = CaptionedImagesDataModule(folder, resolution=16, latent_cache=cache, broken_images="skip")
    module = Reader(0, breaks)
    trainer(max_steps=24).fit(module, data)
    assert len({caption for caption, _, _ in module.seen}) == COUNT - 1
    (line,) = [record.getMessage() for record in caplog.records if "stand in" in record.getMessage()]
    assert line.startswith("the latents of ")


@pytest.mark.parametrize("setting", ["stop", "skip"])
class TestAlwaysStops:
    def test_at_the_start(self, folder: Path, setting: Any) -> None:
        truncate(folder / "3.png")
        with pytest.raises(InputError, match=r"3\.png cannot be read"):
            CaptionedImagesDataModule(folder, resolution=16, broken_images=setting).setup("fit")

    @pytest.mark.usefixtures("minute")
    @pytest.mark.parametrize("workers", [0, 2])
    def test_where_images_are_held_out(
        self, folder: Path, save: Save, trainer: Make, setting: Any, workers: int
    ) -> None:
        (save("held_out/0.png").parent / "0.txt").write_text("held out")
        held_out = save("held_out/1.png")
        held_out.with_suffix(".txt").write_text("held out")
        data = CaptionedImagesDataModule(
            folder, resolution=16, num_workers=workers, broken_images=setting, val_root=held_out.parent
        )
        with pytest.raises(InputError, match=r"held_out/1\.png cannot be read"):
            trainer(max_steps=-1, max_epochs=3).fit(Reader(3, lambda: truncate(held_out)), data)


BREAKS = """
from pathlib import Path
from lightning.pytorch import Callback

class Breaks(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            path = Path(trainer.default_root_dir, "images", "3.png")
            path.write_bytes(path.read_bytes()[:40])
"""


class TestCommandLine:
    @pytest.fixture
    def arguments(self, folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Those of a run in which an image breaks after two steps."""
        (tmp_path / "breaks.py").write_text(BREAKS)
        monkeypatch.syspath_prepend(tmp_path)
        config = {
            "model": {"class_path": "SDXLModule", "init_args": {"pretrained": str(tiny)}},
            "data": {
                "class_path": "CaptionedImagesDataModule",
                "init_args": {"root": str(folder), "resolution": 16},
            },
            "trainer": {
                "max_steps": 18,
                "accelerator": "cpu",
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "default_root_dir": str(tmp_path),
                "callbacks": [{"class_path": "breaks.Breaks"}],
            },
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return ["fit", "--config", str(tmp_path / "config.yaml")]

    @pytest.mark.usefixtures("minute")
    @pytest.mark.parametrize("workers", [0, 2])
    def test_stop(self, folder: Path, arguments: list[str], workers: int, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main([*arguments, f"--data.num_workers={workers}"])
        assert ended.value.code == 2
        lines = capfd.readouterr().err.splitlines()
        assert [line for line in lines if "3.png" in line] == lines[-1:]
        assert lines[-1].startswith(f"lit-edm: error: {folder / '3.png'} cannot be read as an image (")

    def test_skip(self, folder: Path, tmp_path: Path, arguments: list[str]) -> None:
        """Workers tell of it where the user looks."""
        command = [sys.executable, "-m", "lit_edm", *arguments, "--data.num_workers=2", "--data.broken_images=skip"]
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment)
        assert ended.returncode == 0, ended.stderr
        lines = [line for line in ended.stderr.splitlines() if "3.png" in line]
        assert 1 <= len(lines) <= 2, "once in each process that reads"
        assert all(line.startswith(f"{folder / '3.png'} cannot be read as an image (") for line in lines)
        assert all(line.endswith("; until then others of its size and kind stand in for it") for line in lines)
