"""What the tiny base has learned, and what fine-tuning teaches it: the gates, each by figures and by a sheet.

G1  A sheet of 16 flat icons, to be looked at: can one name them?
G2  The true icon that is nearest to a drawn one, in latents: is it that of the prompt?
G3  Does the quickstart teach the style of its 22 icons? See tiny_base_tuning.
G4  The same figures for other ways of training, which should separate good ones from bad ones.
G5  Does G3 hold with the margins that a test asks for, and fails without a part of the training?
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_base_data import SIDE, picture_file, read_split, slug
from tiny_base_tuning import (
    FLAT,
    QUICKSTART,
    WAYS,
    HeldOut,
    draw,
    drawings,
    figures,
    fine_tune,
    latents_of,
    missed,
    ratios,
    ratios_of_parts,
    read_pictures,
)
from torch import Tensor

from lit_edm.callbacks.sheet import contact_sheet, to_pictures
from lit_edm.files import write_whole
from lit_edm.modules import SDXLModule

HEADING = "\n## What it has learned\n\n"
"""Of the part of the card that has the figures."""

NAMED, IN_A_ROW = 16, 20
"""Icons of the sheet of G1, and of a row of that of G2."""


def check_base(data: Path, base: Path, folder: Path, gates: Sequence[str], seeds: int) -> dict[str, Any]:
    """Measures gates; writes check.json and sheets, and the figures into the base's card; returns them, too.

    Args:
        data: Folder of the data step, which G1 and G2 need.
        base: The exported base.
        folder: Where to write; what check.json has of other gates is kept.
        gates: Of G1, G2, G3 and G4.
        seeds: Fine-tuning runs of each way of training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "check.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if {"G1", "G2"} & set(gates):
        found |= drawn_flat(data, base, folder)
    if {"G3", "G4"} & set(gates):
        found.setdefault("tuning", {})
        for way in WAYS if "G4" in gates else [QUICKSTART]:
            found["tuning"][way] = [tuned(base, folder, way, seed) for seed in range(seeds)]
    write_whole(file, lambda part: part.write_text(json.dumps(found, indent=1) + "\n"))
    card = (base / "README.md").read_text(encoding="utf-8").partition(HEADING)[0] + HEADING + report(found)
    write_whole(base / "README.md", lambda part: part.write_text(card, encoding="utf-8"))
    return found


def drawn_flat(data: Path, base: Path, folder: Path) -> dict[str, Any]:
    """Draws every concept flat, and finds the nearest true icon of each; writes two sheets."""
    module, names = load(base), read_split(data).concepts
    images, true = draw(module, [FLAT.format(name=name) for name in names]), true_flat(data, names)
    nearest = nearest_of(latents_of(module, images), latents_of(module, true))
    right = [number == row for row, number in enumerate(nearest)]
    shown = torch.linspace(0, len(names) - 1, min(NAMED, len(names))).long().tolist()
    write_sheet(folder / "G1.png", {f"row {n // 8 + 1}": images[shown[n : n + 8]] for n in range(0, len(shown), 8)}, 2)
    rows = {"drawn": images, "true": true, "nearest": true[nearest]}
    parts = range(0, len(names), IN_A_ROW)
    write_sheet(folder / "G2.png", {f"{key} {n}": row[n : n + IN_A_ROW] for n in parts for key, row in rows.items()})
    return {
        "named": [names[number] for number in shown],
        "nearest_is_right": sum(right) / len(right),
        "wrong": {names[row]: names[nearest[row]] for row in range(len(names)) if not right[row]},
    }


def true_flat(data: Path, names: Sequence[str]) -> Tensor:
    """Returns the true flat icons of concepts, on white, pixels (B, 3, SIDE, SIDE)."""
    return read_pictures([data / "flat" / picture_file(name, "flat", "white", SIDE) for name in names])


def tuned(base: Path, folder: Path, way: str, seed: int) -> dict[str, float]:
    """Fine-tunes in one way from one seed; draws a sheet, and returns what G3 compares."""
    held_out = HeldOut(base / "held_out")
    before, after = fine_tune(base, seed, WAYS[way])
    drawn = drawings(before, after, held_out)
    rows = {"true 3d": held_out.pictures("3d"), **drawn}
    write_sheet(folder / f"{slug(way).replace(',', '')}-{seed}.png", rows)
    found = figures(before, after, held_out, drawn)
    both = found | ratios(found) | ratios_of_parts(found)
    print(way, seed, {name: round(value, 3) for name, value in both.items()}, "missed", missed(found), flush=True)
    return found


def load(base: Path) -> SDXLModule:
    """Returns a module that draws as the base does."""
    module = SDXLModule(str(base), adapter=None)
    module.configure_model()
    return module.eval()


def nearest_of(some: Tensor, others: Tensor) -> list[int]:
    """Returns which of others is nearest to each of some."""
    return torch.cdist(some.flatten(1), others.flatten(1)).argmin(1).tolist()


def write_sheet(path: Path, rows: Mapping[str, Tensor], scale: int = 1) -> None:
    """Writes rows of images, each (B, 3, H, W), enlarged by a whole number."""
    pictures = {title: to_pictures(images) for title, images in rows.items()}
    columns = max(len(row) for row in pictures.values())
    contact_sheet(pictures, [""] * columns, scale * SIDE).save(path)


def report(found: Mapping[str, Any]) -> str:
    """Returns the figures as Markdown."""
    lines = list[str]()
    if "nearest_is_right" in found:
        lines += [
            f"G1: to be looked at are {', '.join(found['named'][:8])};",
            f"{', '.join(found['named'][8:])}.",
            "",
            f"G2: the nearest true icon is the right one for {found['nearest_is_right']:.1%} of all things.",
            "",
        ]
    if ways := found.get("tuning"):
        lines += table(ways)
    return "\n".join(lines) + "\n"


def table(ways: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Returns a column for each way of training: means over its runs, and how many hold what is asked of them."""

    def row(title: str, cells: Iterable[str]) -> str:
        return "| " + " | ".join([title, *cells]) + " |"

    runs = list(ways.values())
    means = {key: [f"{sum(run[key] for run in some) / len(some):.3f}" for some in runs] for key in runs[0][0]}
    return [
        row("", ways),
        "|---" * (1 + len(ways)) + "|",
        *(row(key, cells) for key, cells in means.items()),
        row("G3 holds", (f"{sum(max(ratios(run).values()) < 1 for run in some)} of {len(some)}" for some in runs)),
        row("G5 holds", (f"{sum(not missed(run) for run in some)} of {len(some)}" for some in runs)),
    ]
