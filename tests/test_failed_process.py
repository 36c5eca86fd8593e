"""A process that fails ends the others within a minute: none is left waiting for it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from lit_edm.cache import DiskCache
from lit_edm.data.labelled import LabelledImagesDataModule

LIMIT = 60.0
"""Seconds that the others may take to end."""


class Fails(Callback):
    """Fails on one process: raises, is killed as by the system for want of memory, or waits for nothing.

    Args:
        rank: The process.
        how: raises, is_killed or hangs.
        when: In setup, or in a step.
        mark: File that is written when it does.
    """

    def __init__(self, rank: int, how: str, when: str, mark: str) -> None:
        self.rank = rank
        self.how = how
        self.when = when
        self.mark = Path(mark)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.when == "setup":
            self.fail(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self.when == "step" and trainer.global_step == 2:
            self.fail(trainer)

    def fail(self, trainer: Trainer) -> None:
        if trainer.global_rank == self.rank:
            self.mark.touch()
            getattr(self, self.how)()

    def raises(self) -> None:
        raise RuntimeError("a wire is loose")

    def is_killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs(self) -> None:
        time.sleep(10 * LIMIT)


@dataclass(frozen=True)
class FullOnOne(DiskCache):
    """A cache in which the second process cannot write anything."""

    mark: str

    def put(self, key: str, tensors: Any) -> None:
        if os.environ["LOCAL_RANK"] == "1":
            Path(self.mark).touch()
            raise RuntimeError("a wire is loose")
        super().put(key, tensors)


class Patches(LabelledImagesDataModule):
    """Eight grey images, 1 x 4 x 4."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__(0.0, batch_size, 0, seed=0)
        self.image_shape = (1, 4, 4)
        self.class_names = ["grey"]

    def read(self) -> tuple[Any, Any]:
        examples = [{"image": torch.zeros(1, 4, 4), "label": 0}] * 8
        return examples, examples


PIXELS = [
    "--model=EDMModule",
    "--model.network=SmallUNet",
    "--model.network.in_channels=1",
    "--model.network.channels=8",
    "--model.network.multipliers=[1]",
    "--model.image_shape=[1,4,4]",
    f"--data={Path(__file__).stem}.Patches",
]
TRAINER = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=2",
    "--trainer.max_steps=1000",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
]


def failing(rank: int, how: str, when: str, mark: Path) -> list[str]:
    given = {"rank": rank, "how": how, "when": when, "mark": mark}
    return [
        f"--trainer.callbacks+={Path(__file__).stem}.Fails",
        *(f"--trainer.callbacks.{key}={value}" for key, value in given.items()),
    ]


def seconds_to_end(launcher: list[str], arguments: list[str], folder: Path) -> tuple[float, int, str]:
    """Runs a command; returns seconds from the mark to the end of its last process, the exit code and the output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, "fit", *arguments, *TRAINER, f"--trainer.default_root_dir={folder}"],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    mark, deadline = folder / "mark", time.time() + 3 * LIMIT  # it takes a while to begin
    try:
        while process.poll() is None or is_there(process.pid):
            assert time.time() < deadline, (folder / "output").read_text()[-2000:]
            time.sleep(0.1)
    finally:
        if is_there(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    output = (folder / "output").read_text()
    assert mark.exists(), output
    return time.time() - mark.stat().st_mtime, process.returncode, output


def is_there(group: int) -> bool:
    """Tells whether a process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("how", "when", "rank", "strategy"),
    [
        ("raises", "step", 0, "ddp"),
        ("raises", "setup", 1, "ddp"),
        ("is_killed", "step", 0, "ddp"),
        ("is_killed", "step", 1, "ddp"),
        ("is_killed", "step", 1, "ddp_fork"),
    ],
)
def test_the_others_end(tmp_path: Path, how: str, when: str, rank: int, strategy: str) -> None:
    arguments = [*PIXELS, f"--trainer.strategy={strategy}", *failing(rank, how, when, tmp_path / "mark")]
    seconds, code, output = seconds_to_end(["lit_edm"], arguments, tmp_path)
    assert seconds < LIMIT
    assert code != 0
    assert how != "raises" or "a wire is loose" in output


def test_the_others_end_under_torchrun(tmp_path: Path) -> None:
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lit_edm"]
    arguments = [*PIXELS, "--trainer.strategy=ddp", *failing(1, "is_killed", "step", tmp_path / "mark")]
    seconds, code, _ = seconds_to_end(launcher, arguments, tmp_path)
    assert seconds < LIMIT
    assert code != 0


@pytest.mark.slow
def test_one_that_hangs_is_waited_for_as_long_as_the_strategy_says(tmp_path: Path) -> None:
    strategy = ["--trainer.strategy=DDPStrategy", "--trainer.strategy.timeout=0:00:20"]
    arguments = [*PIXELS, *strategy, *failing(1, "hangs", "step", tmp_path / "mark")]
    seconds, code, _ = seconds_to_end(["lit_edm"], arguments, tmp_path)
    assert seconds < LIMIT
    assert code != 0


def test_nobody_waits_for_one_that_could_not_fill_the_cache(tiny: Path, tmp_path: Path) -> None:
    for index in range(2):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.effect_noise((16, 16), 40 + index).convert("RGB").save(tmp_path / "images" / f"{index}.png")
    arguments = [
        "--trainer.strategy=ddp",
        "--model=SDXLModule",
        f"--model.pretrained={tiny}",
        "--data=CaptionedImagesDataModule",
        f"--data.root={tmp_path / 'images'}",
        "--data.instance_prompt=an icon",
        "--data.resolution=16",
        f"--data.latent_cache={Path(__file__).stem}.FullOnOne",
        f"--data.latent_cache.folder={tmp_path / 'cache'}",
        f"--data.latent_cache.mark={tmp_path / 'mark'}",
    ]
    seconds, code, output = seconds_to_end(["lit_edm"], arguments, tmp_path)
    assert seconds < LIMIT
    assert code != 0
    assert "a wire is loose" in output
