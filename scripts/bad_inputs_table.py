"""Writes docs/bad_inputs.md, mistakes and what the user sees: `python scripts/bad_inputs_table.py`.

The mistakes are in tests/bad_inputs.py.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's client is imported: what the table says needs no network

import io
import runpy
import shutil
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import yaml
from PIL import Image

from lit_edm.cli import main
from lit_edm.sdxl.checkpoint import SDXLCheckpoint
from lit_edm.sdxl.markdown import as_code
from lit_edm.sdxl.tiny import make_tiny_sdxl

ROOT = Path(__file__).parents[1]
CASES: dict[str, list[Any]] = runpy.run_path(str(ROOT / "tests/bad_inputs.py"))["CASES"]
PROGRAM = "lit-edm: error: "
ABOUT = f"""\
# Bad inputs and what the user sees

Each of these ends with exit code 2 and one line, before weights are loaded; those with a star are known only after.
The lines of `lit-edm` begin with `{PROGRAM.strip()}`, which is left out here. Paths are those of a small example: a
folder `images` with `a.png`, `b.png` and `metadata.jsonl`, captions that say TOK, and a base `base` whose VAE has the
factor 2.
"""
TRAINER = {
    "max_steps": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "default_root_dir": "run",
}
CONFIGS = {
    "fit": {
        "model": {"class_path": "SDXLModule", "init_args": {"pretrained": "base", "tokens": {"TOK": 1}}},
        "data": {"class_path": "CaptionedImagesDataModule", "init_args": {"root": "images", "resolution": 16}},
        "trainer": TRAINER,
    },
    "predict": {
        "model": {"class_path": "SDXLModule", "init_args": {"pretrained": "base", "adapter": None}},
        "data": {
            "class_path": "PromptsDataModule",
            "init_args": {"prompts": ["a hat"], "height": 16, "width": 16},
        },
        "trainer": TRAINER,
    },
}


@dataclass(frozen=True)
class Ended:
    """How a command has ended.

    Args:
        code: Its exit code.
        lines: What it wrote to stderr.
        loaded: Whether weights were loaded before.
    """

    code: object
    lines: list[str]
    loaded: bool


def met(case: Any, bases: Path, folder: Path) -> Ended:
    """Runs a case's command in a new folder.

    Args:
        case: The mistake.
        bases: Where the tiny bases are: base, and edm, which is EDM-native.
        folder: The new folder.
    """
    settings = case.settings.split()
    prepare(folder, bases, case.command)
    errors, loaded = io.StringIO(), list[object]()
    load = SDXLCheckpoint.load_vae  # which is loaded first

    def noted(checkpoint: SDXLCheckpoint, *arguments: Any) -> Any:
        loaded.append(checkpoint)
        return load(checkpoint, *arguments)

    with chdir(folder), redirect_stderr(errors), redirect_stdout(io.StringIO()):
        if case.make is not None:
            case.make()
        with patch.object(SDXLCheckpoint, "load_vae", noted):
            code = exit_code(case.command, settings)
    lines = errors.getvalue().replace(f"{folder.resolve()}/", "").splitlines()
    return Ended(code, lines, bool(loaded))


def prepare(folder: Path, bases: Path, command: str) -> None:
    """Makes a folder in which the command works."""
    (folder / "images").mkdir(parents=True)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / f"images/{name}.png")
    captions = ['{"file_name": "a.png", "text": "TOK in red"}', '{"file_name": "b.png", "text": "TOK in blue"}']
    (folder / "images/metadata.jsonl").write_text("\n".join(captions))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIGS.get(command, {})))
    for base in ("base", "edm"):
        shutil.copytree(bases / base, folder / base)


def exit_code(command: str, settings: list[str]) -> object:
    """Runs a command of the command line or a script; returns its exit code."""
    try:
        if command in CONFIGS:
            main([command, "--config", "config.yaml", *settings])
        elif command == "lit-edm":
            main(settings)
        else:
            runpy.run_path(str(ROOT / f"scripts/{command}.py"))["main"](settings)
    except SystemExit as ended:
        return ended.code
    return 0


def make_bases(folder: Path) -> Path:
    """Makes the bases of met; returns the folder."""
    make_tiny_sdxl(folder / "base")
    make_tiny_sdxl(folder / "edm", "edm")
    return folder


def row(case: Any, ended: Ended) -> str:
    """Returns a case's line of its table."""
    seen = as_code(ended.lines[-1].removeprefix(PROGRAM)).replace("|", r"\|")
    return f"| {case.input}{star(case)} | {seen} |\n"


def star(case: Any) -> str:
    """Returns the mark of what is known only after weights are loaded."""
    return r" \*" if case.late else ""


def page(rows: dict[str, list[str]]) -> str:
    """Returns the whole page as Markdown, a table for each topic."""
    head = "| input | what the user sees |\n| --- | --- |\n"
    return "\n".join([ABOUT, *(f"## {topic}\n\n{head}{''.join(lines)}" for topic, lines in rows.items())])


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        bases, number = make_bases(Path(temporary, "bases")), iter(range(1000))
        rows = {
            topic: [row(case, met(case, bases, Path(temporary, str(next(number))))) for case in cases]
            for topic, cases in CASES.items()
        }
    (ROOT / "docs/bad_inputs.md").write_text(page(rows), encoding="utf-8")
