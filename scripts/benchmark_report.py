"""The tables of what `benchmark.py` has found."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark_phases import PHASES
from benchmark_setup import Settings

from lit_edm.sdxl.memory import GIB

MARKER = "<!-- All below is written by scripts/benchmark.py; what stands above is kept. -->"
SHOWN_APART = ("size", "side", "batch_size", "steps", "turn", "warmup", "profiled", "clock", "memory", "pivot", "note")
"""Settings that are columns of the table, or say how is measured rather than what."""
TITLE = "# Training against the bare networks\n\n"
COLUMNS = [
    *("run", "part", "step s", "floor s", "step / floor", "images/s"),
    *("clip + optimizer", "GiB floor", "GiB start", "GiB steps", "TFLOP a step", "TFLOP/s", "of matmul"),
]


def write_report(runs: Sequence[dict[str, Any]], file: Path) -> None:
    """Writes the tables below the marker of a Markdown file, keeping the findings that people wrote above it."""
    above = file.read_text(encoding="utf-8").partition(MARKER)[0] if file.exists() else TITLE
    file.write_text(above + report(runs), encoding="utf-8")


def report(runs: Sequence[dict[str, Any]]) -> str:
    """Returns the marker and all below."""
    return "\n".join([MARKER, "", *run_tables(runs)]) + "\n"


def run_tables(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Returns what was measured, the numbers, and the phases, a table each."""
    numbered = list(enumerate(runs, start=1))
    parts = [(number, run, name, part) for number, run in numbered for name, part in run["parts"].items()]
    return [
        *table(
            ["run", "what", "on", "first step s"],
            [[str(number), what(run), on_what(run), f"{run['first_step']:.3g}"] for number, run in numbered],
            text=3,
        ),
        "",
        *table(COLUMNS, [[str(number), name, *numbers(part)] for number, _, name, part in parts], text=2),
        "",
        "Shares of a step, in other steps than those above:",
        "",
        *table(
            ["run", "part", "step s", *PHASES, "rest"],
            [[str(number), name, *shares(part["phases"])] for number, _, name, part in parts],
            text=2,
        ),
    ]


def what(run: dict[str, Any]) -> str:
    """Tells what a run was, in its settings that are not the usual ones."""
    settings, usual = run["settings"], asdict(Settings())
    told = [f"{settings['size']}, {settings['side']} px, batch {settings['batch_size']}"]
    told += [
        f"{key}: {value}"
        for key, value in settings.items()
        if key not in SHOWN_APART and value not in (usual.get(key), [])
    ]
    return "; ".join([*told, *([settings["note"]] if settings["note"] else [])])


def on_what(run: dict[str, Any]) -> str:
    """Tells when and on what it was measured."""
    versions = run["versions"]
    time = f"{run['settings']['clock']} time of {run['threads']} thread{'s' * (run['threads'] > 1)}"
    return f"{run['date']}, {run['commit']}, {run['chip']}, {time}, torch {versions['torch']}, peft {versions['peft']}"


def numbers(part: dict[str, Any]) -> list[str]:
    """Returns the numbers of a part of a run, as cells."""
    phases, memory = part["phases"], part["memory"]
    optimizer = (phases["clip"] + phases["optimizer"]) / sum(phases.values())
    peaks = [f"{memory[name] / GIB:.2f}" if memory else "" for name in ("floor", "start", "steps")]
    return [
        f"{part['step']:.4g}",
        f"{part['floor']:.4g}",
        f"{part['ratio']:.3f}",
        f"{part['images_per_second']:.3g}",
        f"{optimizer:.1%}",
        *peaks,
        f"{part['flop'] / 1e12:.3g}",
        f"{part['flops'] / 1e12:.3g}",
        f"{part['utilisation']:.0%}",
    ]


def shares(phases: dict[str, float]) -> list[str]:
    """Returns the seconds of a step and the share of each of its phases, as cells."""
    total = sum(phases.values())
    return [f"{total:.4g}", *(f"{phases[name] / total:.1%}" for name in (*PHASES, "rest"))]


def table(head: list[str], rows: list[list[str]], text: int) -> list[str]:
    """Returns the lines of a Markdown table whose columns are numbers but for the first."""
    rules = [":--"] * text + ["--:"] * (len(head) - text)
    return [f"| {' | '.join(cells)} |" for cells in (head, rules, *rows)]
