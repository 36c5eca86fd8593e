import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils._pytree import tree_leaves

from lit_edm.callbacks import (
    EndOnSigterm,
    ExponentialMovingAverage,
    SampleSheet,
    SeamlessResume,
    ValidationImages,
    ValidationLoss,
)
from lit_edm.checkpoints import WholeCheckpointIO, fault_of, find_last
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.edm import EulerSampler
from lit_edm.errors import InputError
from lit_edm.loggers import ResumableCSVLogger
from lit_edm.modules import SDXLModule
from lit_edm.sdxl import LoRA


class Scheduler(Callback):
    """Sends SIGTERM to its own process, as a cluster's scheduler would, in a hook for the n-th time."""

    def __init__(self, hook: str, turn: int, times: int = 1) -> None:
        self.turns = 0

        def send(*_: Any, **__: Any) -> None:
            self.turns += 1
            if self.turns == turn:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, hook, send)


@pytest.fixture
def run(trainer: Callable[..., Trainer], pixels: Callable[..., Any], patches: Any) -> Callable[..., Trainer]:
    """Trains on small images for 14 steps of 3 an epoch, with all that a run has, from the newest checkpoint on."""

    def fit(folder: Path, *others: Callback, resumed: bool = False, workers: int = 0, **settings: Any) -> Trainer:
        keep = ModelCheckpoint(folder / "kept", monitor="val/loss", enable_version_counter=False)
        usual = [ExponentialMovingAverage(100), ValidationLoss([0.5, 2.0]), SampleSheet(4, 1, 2)]
        made = trainer(
            *others,
            *usual,
            keep,
            SeamlessResume(),
            EndOnSigterm(),
            **{"max_steps": 14, "max_epochs": -1, "val_check_interval": 5, "check_val_every_n_epoch": None} | settings,
            logger=ResumableCSVLogger(folder, "", ""),
            log_every_n_steps=1,
            enable_checkpointing=True,
            num_sanity_val_steps=0,
            default_root_dir=folder,
            plugins=[WholeCheckpointIO()],
        )
        module = pixels(optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3))
        path = str(find_last(made)) if resumed else None
        made.fit(module, patches(num_workers=workers), ckpt_path=path)
        made.save_checkpoint(folder / "end.ckpt")
        return made

    return fit


def same(one: Any, other: Any) -> bool:
    """Tells whether nested values are equal to the bit."""
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    return all(a.equal(b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def same_ends(one: Path, other: Path) -> None:
    """Asserts that two runs ended with the same bits, and wrote the same rows and the same pictures."""
    first, second = (torch.load(folder / "end.ckpt", weights_only=True) for folder in (one, other))
    for key in ("state_dict", "optimizer_states", "global_step", "epoch"):
        assert same(first[key], second[key]), key
    averages = next(key for key in first["callbacks"] if "Average" in key)
    assert same(first["callbacks"][averages], second["callbacks"][averages])
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    assert [path.name for path in sorted(one.glob("samples/*"))] == [p.name for p in sorted(other.glob("samples/*"))]


@pytest.mark.parametrize(
    ("hook", "turn"),
    [
        ("on_before_optimizer_step", 2),
        ("on_train_batch_end", 5),  # before the validation that is due
        ("on_train_batch_end", 3),  # the last of an epoch
        ("on_validation_batch_start", 2),  # within a validation
        ("on_validation_batch_end", 1),
        ("on_validation_end", 1),
        ("on_train_epoch_end", 2),
        ("on_save_checkpoint", 1),
    ],
)
def test_the_run_goes_on_as_if_nothing_had_been(
    run: Callable[..., Trainer], tmp_path: Path, hook: str, turn: int
) -> None:
    run(tmp_path / "whole")
    with pytest.raises(SIGTERMException):
        run(tmp_path / "ended", Scheduler(hook, turn, times=2))
    assert (tmp_path / "ended/kept/last.ckpt").exists()
    assert not list((tmp_path / "ended/kept").glob(".*")), "no parts"
    run(tmp_path / "ended", resumed=True)
    same_ends(tmp_path / "whole", tmp_path / "ended")


def test_validation_after_each_epoch(run: Callable[..., Trainer], tmp_path: Path) -> None:
    settings = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    run(tmp_path / "whole", **settings)
    with pytest.raises(SIGTERMException):
        run(tmp_path / "ended", Scheduler("on_validation_batch_start", 2), **settings)
    run(tmp_path / "ended", resumed=True, **settings)
    same_ends(tmp_path / "whole", tmp_path / "ended")


def test_with_workers(run: Callable[..., Trainer], tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(SIGTERMException):
        run(tmp_path / "ended", Scheduler("on_before_optimizer_step", 7), workers=2)
    run(tmp_path / "ended", resumed=True, workers=2)
    same_ends(tmp_path / "whole", tmp_path / "ended")


def test_nothing_is_saved_before_the_first_step(run: Callable[..., Trainer], tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        run(tmp_path, Scheduler("on_train_start", 1))
    assert not list((tmp_path / "kept").glob("*"))


def test_without_a_folder_for_checkpoints(
    trainer: Callable[..., Trainer], pixels: Any, patches: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(SIGTERMException):
        trainer(Scheduler("on_train_batch_start", 2), EndOnSigterm()).fit(pixels(), patches())
    assert "SIGTERM: the run ends at step 2, and no ModelCheckpoint keeps it" in caplog.text


def test_an_error_saves_nothing(run: Callable[..., Trainer], tmp_path: Path) -> None:
    class Broken(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            assert trainer.global_step < 3

    with pytest.raises(AssertionError):
        run(tmp_path, Broken())
    assert not list((tmp_path / "kept").glob("*"))


def test_pictures_are_given_up_and_rendered_on_resuming(
    tiny: Path, icons: Path, tmp_path: Path, trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(folder: Path, path: Path | None = None) -> None:
        pictures = ValidationImages(["a", "b", "c"], every_n_steps=2, resolution=16, sampler=EulerSampler(1))
        keep = ModelCheckpoint(folder / "kept")
        settings = {"logger": False, "enable_checkpointing": True, "default_root_dir": folder}
        module = SDXLModule(str(tiny), adapter=LoRA(rank=2))
        data = CaptionedImagesDataModule(icons, instance_prompt="an icon", resolution=16)
        trainer(pictures, keep, EndOnSigterm(), **settings).fit(module, data, ckpt_path=path)

    def sample(*args: Any) -> Any:
        sampled.append(args)
        if len(sampled) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    original, sampled = SDXLModule.sample, []
    fit(tmp_path / "whole")
    monkeypatch.setattr(SDXLModule, "sample", sample)
    with pytest.raises(SIGTERMException):
        fit(tmp_path / "ended")
    assert len(sampled) == 5, "three before training, two of three after step 2"
    fit(tmp_path / "ended", tmp_path / "ended/kept/last.ckpt")
    names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole/images").rglob("*.png")]
    assert len(names) == 10
    assert all((tmp_path / "ended" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)


SLOW = """
import os, time
from pathlib import Path
from lit_edm.cli import main
from lit_edm.data import loading
from lit_edm.modules import SDXLModule

original = getattr(SDXLModule, name := os.environ["SLOW"])

def slow(*args, **settings):
    Path(name).touch()
    time.sleep(0.2)
    return original(*args, **settings)

def late(worker, original=loading.end_with_training):
    time.sleep(2 * worker)  # the first one makes the first batch, the others are still starting
    original(worker)

setattr(SDXLModule, name, slow)
loading.end_with_training = late
main()
"""


@pytest.mark.parametrize(
    ("where", "processes", "to", "code"),
    [
        ("training_step", 1, [0], 143),
        ("training_step", 1, None, 143),  # to all, loaders' workers too
        ("training_step", 2, [1], 143),
        ("sample", 2, [0, 1], 143),  # before training
        ("moments", 2, [0], -signal.SIGTERM),
    ],
)
def test_by_the_command_line(
    tiny: Path, icons: Path, tmp_path: Path, where: str, processes: int, to: list[int] | None, code: int
) -> None:
    """Wherever it is, a run ends within seconds, all of its processes, without a traceback."""
    (tmp_path / "slow.py").write_text(SLOW)
    keep = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "kept"), "save_top_k": 0}}
    pictures = {"class_path": "ValidationImages", "init_args": {"prompts": ["a"] * 50, "resolution": 16}}
    config = {
        "model": {"class_path": "SDXLModule", "init_args": {"pretrained": str(tiny)}},
        "data": {
            "class_path": "CaptionedImagesDataModule",
            "init_args": {"root": str(icons), "resolution": 16, "latent_cache": {"class_path": "MemoryCache"}}
            | {"num_workers": 0 if to else 2},
        },
        "trainer": {
            "max_steps": 1000,
            "accelerator": "cpu",
            "logger": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [keep, pictures] if where == "sample" else [keep],
            "devices": processes,
            "strategy": "ddp" if processes > 1 else "auto",
        },
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    command = [sys.executable, "slow.py", "fit", "--config", "config.yaml"]
    environment = {**os.environ, "SLOW": where, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        while not (tmp_path / where).exists():
            assert run.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        ranks = [run.pid, *map(int, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split())]
        if to is None:
            os.killpg(run.pid, signal.SIGTERM)
        for rank in to or ():
            os.kill(ranks[rank], signal.SIGTERM)
        assert run.wait(30) == code, (tmp_path / "log").read_text()
        assert all(ended(pid) for pid in ranks)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    kept = tmp_path / "kept/last.ckpt"
    assert (fault_of(kept) is None and f"is saved in {kept}" in text) if where == "training_step" else not kept.exists()


def test_several_processes_cannot_save_what_one_of_them_raises() -> None:
    keeper = ModelCheckpoint(save_on_exception=True)
    trainer: Any = SimpleNamespace(world_size=2, checkpoint_callbacks=[keeper])
    with pytest.raises(InputError, match="save_on_exception must be false"):
        EndOnSigterm().setup(trainer, None, "fit")  # type: ignore[arg-type]


def ended(process: int) -> bool:
    """Waits up to ten seconds for a process to end."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False
