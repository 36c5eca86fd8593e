"""Measures how cost grows with images, repeats, rank, resolution and processes: `python scripts/benchmark_growth.py`.

Writes the tables below the marker of benchmarks/growth.md, and keeps what stands above it.
"""

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from benchmark import circumstances
from benchmark_floor import BareNetworks, flop
from benchmark_memory import peak
from benchmark_report import table
from benchmark_setup import Settings, be_quiet, build
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from lit_edm.data import CaptionedImagesDataModule
from lit_edm.edm import EpsPreconditioning
from lit_edm.sdxl import LoRA, SDXLDenoiser
from lit_edm.sdxl.memory import GIB, bytes_of, kept_by_unet
from lit_edm.sdxl.sizes import SIZES
from lit_edm.sdxl.tiny import made_in, make_unet

ROOT = Path(__file__).parents[1]
MARKER = "<!-- All below is written by scripts/benchmark_growth.py; what stands above is kept. -->"
CPU = torch.device("cpu")
MB = 10**6
BATCHES = 100


def main(
    images: list[int] = [100, 1_000, 10_000, 100_000],  # noqa: B006 (a list is what the command line gives)
    repeats: list[int] = [1, 10, 100, 10_000],  # noqa: B006
    ranks: list[int] = [4, 8, 16, 32, 64, 128],  # noqa: B006
    sides: list[int] = [256, 512, 1024],  # noqa: B006
    processes: list[int] = [1, 2, 4],  # noqa: B006
    output: Path = ROOT / "benchmarks",
) -> None:
    """Measures each in processes of their own, one thing growing at a time.

    Args:
        images: Numbers of tiny images in a folder.
        repeats: Of 100 images.
        ranks: Of LoRA.
        sides: Of images in pixels.
        processes: That train together.
        output: Folder to write to.
    """
    found = circumstances(CPU)
    first = f"{found['date']}, {found['commit']}, {found['chip']}, {found['threads']} thread(s), CPU time"
    lines = [MARKER, "", first, ""]
    lines += [*of_data("images", [(count, 1) for count in images]), ""]
    lines += [*of_data("repeats of 100 images", [(100, times) for times in repeats]), ""]
    lines += [*of_rank(ranks), "", *of_resolution(sides), "", *of_processes(processes)]
    print("\n".join(lines))
    file = output / "growth.md"
    above = file.read_text(encoding="utf-8").partition(MARKER)[0] if file.exists() else "# How cost grows\n\n"
    file.write_text(above + "\n".join(lines) + "\n", encoding="utf-8")


def of_data(what: str, cases: Sequence[tuple[int, int]]) -> list[str]:
    """Returns a table of what images and repeats cost a data module; see `measure_data`."""
    head = [what, "setup s", "setup MB", "first batch s", "first batch MB", "ms a batch of 4", "draws in an epoch"]
    rows = []
    for count, times in cases:
        found = alone("data", count, times)
        number = f"{times if what != 'images' else count:,}"
        cells = (found["setup"], found["setup_bytes"] / MB, found["first"], found["first_bytes"] / MB)
        rows.append([number, *(f"{cell:.3g}" for cell in cells), f"{1e3 * found['batch']:.2g}", f"{count * times:,}"])
    return table(head, rows, text=0)


def measure_data(count: int, repeats: int) -> dict[str, float]:
    """Sets up a data module of so many images of 16 px, and takes batches; bytes are those that the peak grows by."""
    with TemporaryDirectory() as folder:
        file = io.BytesIO()
        Image.effect_noise((16, 16), 50).convert("RGB").save(file, "PNG")
        for number in range(count):
            Path(folder, f"{number}.png").write_bytes(file.getvalue())
        data = CaptionedImagesDataModule(
            folder, instance_prompt="a photo", resolution=16, repeats=repeats, batch_size=4
        )
        start = peak(CPU)
        setup, _ = seconds(lambda: data.setup("fit"))
        after = peak(CPU)
        first, batches = seconds(lambda: (each := iter(data.train_dataloader()), next(each))[0])
        end = peak(CPU)
        some = min(BATCHES, count * repeats // 4 - 1)
        batch, _ = seconds(lambda: [next(batches) for _ in range(some)])
        return {
            "setup": setup,
            "setup_bytes": after - start,
            "first": first,
            "first_bytes": end - after,
            "batch": batch / some,
        }


def of_rank(ranks: Sequence[int]) -> list[str]:
    """Returns a table of what a rank costs: counted on SDXL, timed on the small base."""
    head = ["rank of LoRA on SDXL", "trained, million", "optimizer MB (Prodigy)", "step s of the small base, 128 px"]
    rows = []
    for rank in ranks:
        trained = sum(p.numel() for p in sdxl(rank).parameters() if p.requires_grad)
        found = alone("training", 128, rank, 1)
        state = trained * found["optimizer"] / found["trained"]
        rows.append([str(rank), f"{trained / 1e6:.1f}", f"{state / MB:.0f}", f"{found['step']:.2f}"])
    return table(head, rows, text=0)


def of_resolution(sides: Sequence[int]) -> list[str]:
    """Returns a table of what a resolution costs: counted on SDXL with LoRA of rank 8, timed on the small base."""
    head = ["px", "TFLOP an image", "GiB kept in bf16", "GiB with checkpointing", "step s of the small base"]
    rows = []
    for side in sides:
        shape = (1, 4, side // 8, side // 8)
        kept = [kept_by_unet(sdxl(8, again), torch.bfloat16, shape, learns_text=False) or 0 for again in (False, True)]
        step = alone("training", side, 8, 1)["step"]
        cells = (flop_of_an_image(sdxl(8), shape[1:]) / 1e12, *(size / GIB for size in kept), step)
        rows.append([str(side), *(f"{cell:.3g}" for cell in cells)])
    return table(head, rows, text=0)


def of_processes(numbers: Sequence[int]) -> list[str]:
    """Returns a table of what processes tell each other in a step."""
    head = ["processes", "kB of trained parameters, small base", "kB that DDP reduces in a step", "frozen, kB"]
    rows = []
    for number in numbers:
        found = alone("training", 64, 8, number)
        sizes = (found["trained_bytes"], found["reduced"], found["frozen_bytes"])
        rows.append([str(number), *(f"{size / 1e3:,.1f}" for size in sizes)])
    return table(head, rows, text=0)


class Notes(Callback):
    """Times steps but for the first, and counts the bytes of gradients that processes reduce in each.

    Args:
        file: Where the first process leaves what it finds, in the end.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.times: list[float] = []
        self.reduced = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to DDP, if that is how processes train together."""
        if trainer.world_size > 1:
            trainer.strategy.model.register_comm_hook(None, self.reduce)  # type: ignore[union-attr,operator]

    def reduce(self, state: None, bucket: GradBucket) -> Future[Tensor]:
        """Averages the gradients of a bucket, as DDP does without this."""
        self.reduced += bucket.buffer().nbytes
        return allreduce_hook(torch.distributed.group.WORLD, bucket)  # type: ignore[arg-type] (there is one by now)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Notes the time."""
        self.times.append(time.process_time())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes down what there is."""
        of_all = list(pl_module.parameters())
        trained = [parameter for parameter in of_all if parameter.requires_grad]
        state = [value for kept in trainer.optimizers[0].state.values() for value in kept.values()]
        frozen = bytes_of(parameter for parameter in of_all if not parameter.requires_grad)
        found = {
            "step": median(b - a for a, b in zip(self.times, self.times[1:], strict=False)),
            "reduced": self.reduced / len(self.times),
            "trained": sum(parameter.numel() for parameter in trained),
            "trained_bytes": bytes_of(trained),
            "frozen_bytes": frozen,
            "optimizer": bytes_of(value for value in state if isinstance(value, Tensor)),
        }
        if trainer.is_global_zero:
            self.file.write_text(json.dumps(found), encoding="utf-8")


def measure_training(side: int, rank: int, processes: int) -> dict[str, float]:
    """Trains the small base for some steps as configs/sdxl_pivotal.yaml says, before the pivot."""
    with TemporaryDirectory() as folder:
        together = () if processes == 1 else ("--trainer.strategy=ddp_fork", f"--trainer.devices={processes}")
        overrides = (f"--model.adapter.rank={rank}", *together)
        settings = Settings("small", side, 1, "before", steps=4, warmup=1, profiled=1, overrides=overrides)
        cli = build(settings, Path(folder))
        cli.trainer.callbacks.append(Notes(file := Path(folder, "found")))  # type: ignore[attr-defined]
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        return json.loads(file.read_text(encoding="utf-8"))


def sdxl(rank: int, checkpointing: bool = False) -> Any:
    """Returns SDXL's UNet with a LoRA, without values."""
    with made_in(torch.bfloat16, "meta"):
        unet = make_unet(SIZES["full"]).requires_grad_(False)
        LoRA(rank)(unet)
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def flop_of_an_image(unet: Any, shape: tuple[int, int, int]) -> int:
    """Counts the operations of a pass, forward and backward, on one image of latents (C, h, w)."""
    module: Any = SimpleNamespace(denoiser=SDXLDenoiser(unet, EpsPreconditioning()))
    networks = BareNetworks(module, learns=False)
    return flop(networks, networks.inputs(1, shape, torch.device("meta")))


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the CPU time of some work, all threads together, and what it returns."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def alone(what: str, *numbers: int) -> dict[str, float]:
    """Measures something in a process of its own."""
    command = [sys.executable, __file__, what, *map(str, numbers)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


MEASURES: dict[str, Callable[..., dict[str, float]]] = {"data": measure_data, "training": measure_training}

if __name__ == "__main__":
    be_quiet()
    if sys.argv[1:2] and sys.argv[1] in MEASURES:
        print(json.dumps(MEASURES[sys.argv[1]](*map(int, sys.argv[2:]))))
    else:
        auto_cli(main, as_positional=False)
