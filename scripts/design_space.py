"""Repeats the argument of Karras et al. (2022) in minutes on two cores: `python scripts/design_space.py`.

Trains four rows of the design space on 8 x 8 digits, compares all samplers on exact denoisers, and writes
design_space.json, .md, and two plots to benchmarks/. Needs `pip install "lit-edm[digits]" matplotlib`.
"""

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from time import perf_counter
from typing import Any, Literal

import torch
from design_space_report import plot_sampling, plot_training, write_report
from design_space_sampling import compare_samplers
from design_space_training import Budget, Digits, train_all
from jsonargparse import auto_cli
from revision import commit


def design_space(
    steps: int = 1200,
    seeds: int = 3,
    workers: int = 2,
    learning_rate: float = 3e-3,
    only: Literal["training", "sampling"] | None = None,
    output: Path = Path("benchmarks"),
) -> None:
    """Trains, samples, and writes what comes out.

    Args:
        steps: Optimizer steps of every training run.
        seeds: Training runs of every row, from seeds 0, 1, ...
        workers: Processes that train, with one thread each.
        learning_rate: Of every row.
        only: The part to do; what the output folder holds of the other is kept.
        output: Folder to write to.
    """
    torch.set_num_threads(1)
    at = commit()  # before any result is written, which git would see as a change
    output.mkdir(parents=True, exist_ok=True)
    file = output / "design_space.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    if only != "training":
        points = Digits().trained["image"].flatten(1).double()
        found["sampling"] = recorded(lambda: compare_samplers(points), 1, at)
        file.write_text(json.dumps(found, indent=1) + "\n")
    if only != "sampling":
        budget = Budget(steps=steps, learning_rate=learning_rate)
        found["training"] = recorded(lambda: train_all(range(seeds), budget, workers), workers, at)
        file.write_text(json.dumps(found, indent=1) + "\n")
    write_report(found, file.with_suffix(".md"))
    for part, plot in {"training": plot_training, "sampling": plot_sampling}.items():
        if part in found:
            plot(found[part], output / f"design_space_{part}.png")


def recorded(part: Callable[[], dict[str, Any]], workers: int, at: str) -> dict[str, Any]:
    """Does a part of the work at a commit; returns what it found, with what it took and what it was done with."""
    wall, cpu = perf_counter(), cpu_seconds()
    found = part()
    return found | {
        "made": {
            "wall_seconds": perf_counter() - wall,
            "cpu_seconds": cpu_seconds() - cpu,
            "cpu_count": os.cpu_count(),
            "workers": workers,
            "commit": at,
            "versions": {name: version(name) for name in ("torch", "lightning", "numpy", "scikit-learn")},
        }
    }


def cpu_seconds() -> float:
    """Returns the processor time of this process and of its children that have ended."""
    usages = getrusage(RUSAGE_SELF), getrusage(RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    auto_cli(design_space)
