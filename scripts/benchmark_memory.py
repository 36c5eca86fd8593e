"""Measures peak memory in processes that do one thing alone."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from tempfile import TemporaryDirectory

import torch
from benchmark_floor import BareNetworks, Floor
from benchmark_setup import Part, Settings, be_quiet, build
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_edm.cli import CLI

PASSES = 3


class StartUp(Callback):
    """Notes the peak of what comes before training: caches are filled, with all networks there."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the peak and, on a GPU, begins anew."""
        self.peak = peak(pl_module.device)
        begin_anew(pl_module.device)


def peaks(settings: Settings, part: Part) -> dict[str, int]:
    """Returns the peak bytes of the bare networks, of training's start and of its steps, each from a new process.

    On a CPU the peak of steps is never below that of the start, nor any below what this process has had when it is
    called, which is before there is anything in it: the system passes that on.
    """
    few = replace(settings, pivot=part, steps=PASSES - 2, turn=1, warmup=1, profiled=1, no_sync=False)
    found: dict[str, int] = {}
    for what in ("floor", "training"):
        command = [sys.executable, __file__, what, json.dumps(asdict(few))]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found |= json.loads(output.splitlines()[-1])
    return found


def of_floor(cli: CLI, settings: Settings) -> dict[str, int]:
    """Runs the bare networks of a module whose training has not begun, with nothing else beside them."""
    module, trainer, learns = cli.model, cli.trainer, settings.parts[0] == "before"
    device = trainer.strategy.root_device
    module.trainer = trainer
    module.configure_model()
    BareNetworks(module.cpu(), learns).to(device)
    begin_anew(device)
    floor = Floor(module, learns, settings.batch_size, settings.side, trainer.precision_plugin.forward_context)
    for _ in range(PASSES):
        floor()
    return {"floor": peak(device)}


def of_training(cli: CLI) -> dict[str, int]:
    """Trains for a few steps."""
    start = StartUp()
    cli.trainer.callbacks.append(start)  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return {"start": start.peak, "steps": peak(cli.trainer.strategy.root_device)}


def begin_anew(device: torch.device) -> None:
    """Forgets the peak so far, which a process cannot do on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """Returns the most bytes that this process has had so far, on a GPU those of tensors there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return getrusage(RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    be_quiet()
    settings = Settings(**json.loads(sys.argv[2]))
    with TemporaryDirectory() as folder:
        cli = build(settings, Path(folder))
        print(json.dumps(of_floor(cli, settings) if sys.argv[1] == "floor" else of_training(cli)))
