"""Times training against the bare networks, in one process: `python scripts/benchmark.py --size small`.

Adds a run to benchmarks/training.json, and writes benchmarks/training.md, its table.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmark_floor import matmul_flops
from benchmark_memory import peaks
from benchmark_phases import Stopwatch
from benchmark_report import run_tables, write_report
from benchmark_setup import Settings, be_quiet, build
from jsonargparse import ArgumentParser
from revision import commit

from lit_edm.errors import InputError

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "prodigyopt")


def main(args: Sequence[str] | None = None) -> None:
    """Measures, prints and records one run; see Settings.

    Args:
        args: Arguments in place of those of the command line.
    """
    parser = ArgumentParser(description=__doc__)
    parser.add_class_arguments(Settings)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="Folder to write to.")
    options = parser.parse_args(args).as_dict()
    output = Path(options.pop("output"))
    try:
        settings = Settings(**options)
    except InputError as error:
        parser.error(str(error))
    run = measured(settings)
    print("\n".join(run_tables([run])))
    file = output / "training.json"
    runs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    file.write_text(json.dumps([*runs, run], indent=1) + "\n", encoding="utf-8")
    write_report([*runs, run], file.with_suffix(".md"))


def measured(settings: Settings) -> dict[str, Any]:
    """Returns what a run finds, with what it was measured on."""
    memory = {part: peaks(settings, part) for part in settings.parts} if settings.memory else {}
    with TemporaryDirectory() as folder:
        cli = build(settings, Path(folder))
        watch = Stopwatch(settings)
        cli.trainer.callbacks.append(watch)  # type: ignore[attr-defined]
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    device = cli.trainer.strategy.root_device
    best = matmul_flops(device, cli.model.network_dtype(), watch.now)
    unet = cli.model.denoiser.unet
    return circumstances(device) | {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in unet.parameters() if not p.requires_grad),
        "trained": sum(p.numel() for p in unet.parameters() if p.requires_grad),
        "first_step": watch.first_step,
        "matmul_flops": best,
        "parts": {
            part: summary(found, settings.batch_size, best) | {"memory": memory.get(part)}
            for part, found in watch.found.items()
        },
    }


def summary(found: dict[str, Any], batch_size: int, best: float) -> dict[str, Any]:
    """Returns what the times of a part of a run amount to.

    Args:
        found: By Stopwatch.
        batch_size: Images in a step.
        best: Operations a second of a product of large matrices.
    """
    step, floor = (median(found[name]) for name in ("steps", "floors"))
    return {
        "step": step,
        "floor": floor,
        "ratio": step / floor,
        "ratio_of_best": min(found["steps"]) / min(found["floors"]),
        "images_per_second": batch_size / step,
        "flop": found["flop"],
        "flops": found["flop"] / step,
        "utilisation": found["flop"] / step / best,
        "phases": found["phases"],
    }


def circumstances(device: torch.device) -> dict[str, Any]:
    """Returns when, from which code and on what this is measured."""
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "chip": chip(device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def chip(device: torch.device) -> str:
    """Returns the name of a GPU, or that of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    be_quiet()
    main()
