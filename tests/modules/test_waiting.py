"""Between two lines of its logs, training only tells the device what to do, and never waits for an answer."""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_edm.cache import MemoryCache
from lit_edm.callbacks import (
    EndOnSigterm,
    ExponentialMovingAverage,
    FreezeEmbeddings,
    Pace,
    RetractEmbeddings,
    SeamlessResume,
    TrainDuring,
)
from lit_edm.data import AspectBuckets, CaptionedImagesDataModule, TeacherPrior
from lit_edm.edm import (
    AdaptiveNoise,
    EDMLoss,
    LearnedWeighting,
    LogNormal,
    MinSNRWeighting,
    SNRWeighting,
    Stratified,
    UniformTimesteps,
)
from lit_edm.modules import EDMModule, SDXLModule
from lit_edm.optim import GroupedProdigy, WarmupSchedule
from lit_edm.sdxl import DoRA, LatentSpace, LoRA

FAR = torch.device("meta")
"""Stands for a GPU. What is there has no values: who looks at one is told so, with an error."""

COPIES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
PLACES = {Tensor.__getitem__, Tensor.__setitem__}
LISTS = list | range | np.ndarray


class DeviceWaitError(AssertionError):
    """The host would wait for the device."""


class NumbersMadeThere(TorchFunctionMode):
    """Refuses tensors that are made on the device out of numbers of the host, and lists as indices, which become such.

    Operations do not show them: the meta device leaves out the copy.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in COPIES and result.device == FAR and not isinstance(args[-1], Tensor):
            raise DeviceWaitError(f"{func.__name__} of {args[-1]!r}")
        if func in PLACES and args[0].device == FAR:
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, LISTS) for place in places):
                raise DeviceWaitError(f"the index {args[1]!r}")
        return result


class TensorsMovedThere(TorchDispatchMode):
    """Refuses operations on the device with tensors of the host in them, but for copies that nobody waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        places = {value.device for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)}
        if len(places) > 1 and not waits_for_nobody(func, args, kwargs or {}):
            raise DeviceWaitError(f"{func} of tensors on {sorted(map(str, places))}")
        return result


def waits_for_nobody(func: Any, args: Any, kwargs: Any) -> bool:
    """Tells whether an operation on tensors of two devices lets the host go on."""
    if func is torch.ops.aten.copy_.default:
        return len(args) > 2 and args[2]
    return bool(kwargs.get("non_blocking"))


class FarAway(Accelerator):
    """Trains on the meta device."""

    def setup_device(self, device: torch.device) -> None:
        assert device == FAR

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [FAR]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "far"


class OnFarAway(SingleDeviceStrategy):
    """Networks are read on the CPU and leave it before training; there is no way back."""

    def tensor_init_context(self, empty_init: bool | None = None) -> Any:
        return nullcontext()

    def teardown(self) -> None:
        pass


class Watch(Callback):
    """Watches whole batches, all that Lightning does with them included, from the second optimizer step on.

    In the first, a run may still find out and lay out.

    Args:
        watching: Opens the context that fails where the host waits.
    """

    def __init__(self, watching: Callable[[], Any]) -> None:
        self.watching = watching
        self.watched = 0

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        loop.advance = partial(self._advance, trainer, loop.advance)

    def _advance(self, trainer: Trainer, advance: Callable[..., None], *args: Any) -> None:
        trained = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
        assert {parameter.device for parameter in trained} == {trainer.strategy.root_device}
        watched = trainer.global_step > 0
        self.watched += watched
        with self.watching() if watched else nullcontext():
            advance(*args)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.fit_loop.epoch_loop._results.clear()  # which Lightning brings back to the CPU
        trainer._logger_connector.reset_metrics()

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        self.on_train_end(trainer)


@contextmanager
def watching() -> Iterator[None]:
    with NumbersMadeThere(), TensorsMovedThere():
        yield


class Shapes(MemoryCache):
    """Keeps zeros of the shape of what there is to keep."""

    def put(self, key: str, tensors: Any) -> None:
        super().put(key, {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in tensors.items()})


def pivotal(base: Path, images: Path) -> tuple[SDXLModule, CaptionedImagesDataModule, list[Callback]]:
    """Tokens until the pivot, text encoders for a while, Prodigy, min-SNR, buckets, crops, averages; no caches."""
    module = SDXLModule(
        str(base),
        tokens={"TOK": 2},
        adapter=LoRA(rank=2, dropout=0.2),
        text_encoder_adapter=LoRA(rank=2),
        loss=EDMLoss(UniformTimesteps(), MinSNRWeighting(sigma_data=1.0), noise_offset=0.1, input_perturbation=0.1),
        optimizer=lambda groups: GroupedProdigy(groups, weight_decay=0.01),
        lr_scheduler=lambda optimizer: WarmupSchedule(optimizer, warmup_steps=2),
        gradient_checkpointing=True,
    )
    data = CaptionedImagesDataModule(
        str(images / "instance"),
        resolution=16,
        buckets=AspectBuckets(step=4),
        instance_prompt="an icon of TOK",
        caption_dropout=0.5,
        random_crop=True,
        random_flip=True,
        batch_size=2,
    )
    phases = [FreezeEmbeddings(0.5), TrainDuring("text_encoders", stop=2)]
    return module, data, [*phases, RetractEmbeddings(0.1), ExponentialMovingAverage(20.0, None)]


def learned(base: Path, images: Path) -> tuple[SDXLModule, CaptionedImagesDataModule, list[Callback]]:
    """DoRA, AdamW, learned weighting and noise levels, the base as a teacher, masks, memory caches."""
    Image.new("L", (24, 16)).save(images / "instance" / "0.mask.png")
    module = SDXLModule(
        str(base),
        adapter=DoRA(rank=2),
        loss=EDMLoss(AdaptiveNoise(UniformTimesteps(), num_bins=10), LearnedWeighting(SNRWeighting())),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        text_cache=Shapes(),
    )
    data = CaptionedImagesDataModule(
        str(images / "instance"),
        resolution=16,
        instance_prompt="an icon",
        prior=TeacherPrior("a thing"),
        latent_cache=Shapes(),
        caption_dropout=0.3,
        batch_size=3,
    )
    return module, data, [ExponentialMovingAverage(20.0)]


def train(made: Any, watch: Watch, **settings: Any) -> Watch:
    """Trains for some steps, none of which are logged."""
    seed_everything(3, verbose=False)
    module, data, callbacks = made
    quiet = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False, "limit_val_batches": 0}
    always = [Pace(), SeamlessResume(), EndOnSigterm(), watch]
    trainer = Trainer(
        callbacks=[*callbacks, *always], log_every_n_steps=100, gradient_clip_val=1.0, **(quiet | settings)
    )
    trainer.fit(module, data)
    return watch


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Watch]]:
    """Trains on the meta device, with a progress bar."""
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay those that optimizers are given
    for place in ("latents", "conditioning", "placement"):
        monkeypatch.setattr(f"lit_edm.sdxl.{place}.place_frozen", lambda *_: None)  # there is no way back
    monkeypatch.setattr(LatentSpace, "fingerprint", "reads weights, before training")
    monkeypatch.setattr(LatentSpace, "_own_precision", lambda *_: nullcontext())  # which the meta device has none of
    monkeypatch.setattr("lightning.pytorch.loops.fit_loop.has_len_all_ranks", lambda *_: True)  # before an epoch

    def fit(made: Any, **settings: Any) -> Watch:
        return train(made, Watch(watching), strategy=OnFarAway(FAR, FarAway()), **settings)

    yield fit
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_pivotal_tuning(far: Callable[..., Watch], tiny: Path, images: Path) -> None:
    assert far(pivotal(tiny, images), max_steps=4).watched == 3


def test_a_teacher_and_what_learns_from_losses(far: Callable[..., Watch], tiny: Path, images: Path) -> None:
    assert far(learned(tiny, images), max_steps=2, accumulate_grad_batches=2).watched == 2


def denoiser(pixels: Any, patches: Any, *callbacks: Callback) -> tuple[EDMModule, Any, list[Callback]]:
    """A denoiser of images, with noise levels spread over batches."""
    loss = EDMLoss(Stratified(LogNormal()), LearnedWeighting())
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    module = pixels(label_dropout=0.2, loss=loss, optimizer=optimizer)
    return module, patches(batch_size=2), [ExponentialMovingAverage(20.0), *callbacks]


def test_a_denoiser_of_images(far: Callable[..., Watch], pixels: Any, patches: Any) -> None:
    assert far(denoiser(pixels, patches), max_steps=6).watched == 5


class Looks(Callback):
    """Looks at the loss after a batch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            outputs["loss"].item()


def test_one_look_is_seen(far: Callable[..., Watch], pixels: Any, patches: Any) -> None:
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        far(denoiser(pixels, patches, Looks()), max_steps=6)


def test_a_loss_in_the_progress_bar_is_one_that_is_logged(
    trainer: Callable[..., Trainer], pixels: Any, patches: Any, tmp_path: Path
) -> None:
    shown: list[float | None] = []

    class Bar(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            shown.append(trainer.progress_bar_metrics.get("train/loss"))  # type: ignore[arg-type]

    logger = CSVLogger(tmp_path)
    made = denoiser(pixels, patches)
    trainer(Bar(), logger=logger, log_every_n_steps=2, max_steps=6).fit(*made[:2])
    with Path(logger.log_dir, "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["train/loss"]) for row in rows]
    assert [row["step"] for row in rows] == ["1", "3", "5"]
    assert shown == pytest.approx([None, None, logged[0], logged[0], logged[1], logged[1]])


WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: x.equal(x),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "number": lambda x: torch.tensor(0.5, device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "list": lambda x: x[[0, 2]],
    "indices": lambda x: x[torch.tensor([0, 2])],
    "to": lambda x: torch.ones(2).to(x.device),
    "copy": lambda x: x.copy_(torch.ones(3)),
    "where": lambda x: torch.where(x > 0, x, torch.tensor(0.0)),
}


@pytest.mark.parametrize("wait", WAITS)
def test_what_waits_is_seen(wait: str) -> None:
    x = torch.ones(3, device=FAR)
    with pytest.raises((DeviceWaitError, RuntimeError)), watching():  # NotImplementedError is one
        WAITS[wait](x)


def test_what_does_not_wait_is_let_be() -> None:
    x = torch.ones(3, device=FAR)
    with watching():
        x[torch.ones(2).long().to(FAR, non_blocking=True)].copy_(torch.ones(2), non_blocking=True)
        torch.where(x > 0, x * 0.5, 0.0).add_(1).clamp(min=0.1)
        x[0], x[1:] = 1.0, x[:2].clone()
        torch.as_tensor(x), torch.tensor(0.5), torch.full((2,), 0.5, device=FAR)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recipe", [pivotal, learned])
def test_on_a_gpu(tiny: Path, images: Path, recipe: Callable[..., Any]) -> None:
    """Where CUDA itself tells of every wait."""

    @contextmanager
    def strictly() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    assert train(recipe(tiny, images), Watch(strictly), accelerator="gpu", devices=1, max_steps=6).watched == 5
