"""Where the icons of the tiny base come from: Microsoft's Fluent Emoji (MIT) as npm packages have them.

Each emoji is drawn in three styles of one geometry: flat, line (called high contrast there) and 3d.
"""

import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from gzip import decompress
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol
from zipfile import ZipFile

from PIL import Image

from lit_edm.errors import InputError

Style = Literal["flat", "line", "3d"]

PACKAGES = {
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "emojibase-data": "17.0.0",
}
"""npm packages of the icons and of their names."""

WORDS = "open_clip_torch==3.3.0"
"""The Python package that brings CLIP's vocabulary."""

SUBGROUPS = frozenset(
    {"animal-amphibian", "animal-bird", "animal-bug", "animal-mammal", "animal-marine", "animal-reptile"}
    | {"arts-crafts", "award-medal", "book-paper", "clothing", "computer", "dishware", "drink", "event"}
    | {"face-costume", "food-asian", "food-fruit", "food-prepared", "food-sweet", "food-vegetable", "game", "household"}
    | {"light-video", "lock", "mail", "medical", "money", "music", "musical-instrument", "office", "phone"}
    | {"place-building", "place-other", "plant-flower", "plant-other", "science", "sky-weather", "sound", "sport"}
    | {"time", "tool", "transport-air", "transport-ground", "transport-water"}
)
"""Subgroups of emoji that show things, and neither people nor signs."""


class Icons(Protocol):
    """Things that are drawn in all three styles."""

    @property
    def names(self) -> Sequence[str]:
        """What each thing is called, always in the same order."""
        ...

    def draw(self, name: str, style: Style, side: int) -> Image.Image:
        """Returns a picture of so many pixels a side, RGBA."""
        ...


@dataclass(frozen=True)
class FluentIcons:
    """Fluent Emoji of things.

    Args:
        sources: Folder of the unpacked packages, as `fetch` leaves it.
    """

    sources: Path

    @property
    def names(self) -> list[str]:
        """Names of one or two plain words."""
        return list(self._emoji)

    def draw(self, name: str, style: Style, side: int) -> Image.Image:
        """Returns a picture of so many pixels a side, RGBA."""
        icon, photo = self._emoji[name]
        if style == "3d":
            return Image.open(photo).convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
        from resvg_py import svg_to_bytes  # type: ignore[import-not-found] (for this step alone)

        body = (self._flat if style == "flat" else self._line)[icon]["body"]
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="{side}" height="{side}">{body}</svg>'
        return Image.open(BytesIO(svg_to_bytes(svg_string=svg))).convert("RGBA")

    @cached_property
    def _flat(self) -> Mapping[str, Mapping[str, str]]:
        return self._json("@iconify-json/fluent-emoji-flat", "icons.json")["icons"]

    @cached_property
    def _line(self) -> Mapping[str, Mapping[str, str]]:
        return self._json("@iconify-json/fluent-emoji-high-contrast", "icons.json")["icons"]

    @cached_property
    def _emoji(self) -> dict[str, tuple[str, Path]]:
        """Key of the drawings and file of the 3d picture, by name."""
        groups = self._json("emojibase-data", "meta/groups.json")["subgroups"]
        wanted = {int(number) for number, name in groups.items() if name in SUBGROUPS}
        chars = self._json("@iconify-json/fluent-emoji-flat", "chars.json")
        keys = {plain(code): key for code, key in chars.items()}
        photos = {plain(path.stem): path for path in (self.sources / "@lobehub/fluent-emoji-3d/assets").iterdir()}
        found: dict[str, tuple[str, Path]] = {}
        for emoji in self._json("emojibase-data", "en/data.json"):
            name, code = emoji["label"].lower(), plain(emoji["hexcode"].lower())
            key = keys.get(code)
            if key is None or key not in self._flat.keys() & self._line.keys() or code not in photos:
                continue
            if emoji.get("subgroup") in wanted and re.fullmatch("[a-z]+( [a-z]+)?", name):
                found[name] = (key, photos[code])
        return dict(sorted(found.items()))

    def _json(self, package: str, file: str) -> Any:
        return json.loads((self.sources / package / file).read_text(encoding="utf-8"))


def plain(code: str) -> str:
    """Returns an emoji's code points without the mark that asks for its coloured form, which some sets leave out."""
    return "-".join(point for point in code.split("-") if point != "fe0f")


def fetch(folder: Path) -> None:
    """Downloads and unpacks what is not there yet, by npm and pip as they are set up on this machine.

    Raises:
        InputError: One of them fails, or what renders icons is not installed.
    """
    if find_spec("resvg_py") is None:
        raise InputError("resvg-py, which renders the icons, is not installed: pip install resvg-py")
    for package, version in PACKAGES.items():
        if not (target := folder / package).exists():
            folder.mkdir(parents=True, exist_ok=True)
            name = run(["npm", "pack", "--silent", f"{package}@{version}"], folder).split()[-1]
            with tarfile.open(folder / name) as archive:
                archive.extractall(folder / f"{name}.unpacked", filter="data")
            target.parent.mkdir(exist_ok=True)
            (folder / f"{name}.unpacked/package").rename(target)
    if not list(folder.glob("open_clip_torch-*.whl")):
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", WORDS], folder)


def run(command: Sequence[str], folder: Path) -> str:
    """Runs a command in a folder; returns what it printed."""
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise InputError(
            f"{' '.join(command)} failed ({said.strip().splitlines()[-1]}): mend that, or name a folder that has what "
            "it downloads, as --sources"
        ) from error


def read_merges(sources: Path) -> list[tuple[str, str]]:
    """Returns the merges of CLIP's byte pair encoding, in their order."""
    wheel = next(iter(sorted(sources.glob("open_clip_torch-*.whl"))), None)
    if wheel is None:
        raise InputError(f"{sources} has no wheel of open_clip_torch, which has CLIP's vocabulary: add it")
    with ZipFile(wheel) as archive:
        lines = decompress(archive.read("open_clip/bpe_simple_vocab_16e6.txt.gz")).decode().split("\n")
    pairs = (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])
    return [(left, right) for left, right in pairs]
