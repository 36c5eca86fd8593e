"""What the tiny base learns from: which concept is for what, what pictures show, and what captions say.

A concept is a thing with a name. All of this follows from a seed and is settled before anything is trained:

    tuned       what fine-tuning learns the 3d style from (data/icons3d): never seen in 3d before
    held_out    what the learned style is judged on: never seen in 3d by anything that is trained
    concepts    what the UNet learns to draw, flat and as lines; tuned and held out ones are among them
    others      further things, which the VAE alone sees, in all three styles
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from tiny_base_icons import Icons, Style
from tiny_base_styles import RULES, SOFT, STYLES, styled
from tiny_base_words import Pair, prune, write_tokenizer

from lit_edm.errors import InputError
from lit_edm.files import write_whole

ROOT = Path(__file__).parents[1]

SIDE = 64
"""Pixels a side of what the base draws."""

ORIGINAL_SIDES = (64, 256)
"""Pixels a side of the files: the UNet is told, and fine-tuning has files of the second and draws with the first."""

BACKGROUNDS = {
    "white": (255, 255, 255),
    "peach": (250, 236, 223),
    "light blue": (223, 237, 250),
    "light green": (233, 250, 226),
    "lilac": (246, 227, 249),
    "cream": (250, 248, 219),
}
"""Those of data/icons3d, as its captions call them."""

PARTS = ("flat", "styles", "coloured")
"""Folders that the UNet learns from: flat on white, other styles on white, all on coloured backgrounds."""

VAE_STYLES: tuple[Style, ...] = ("flat", "line", "3d")
"""What the VAE learns from; the last without the things that fine-tuning has or is judged on."""

WANTED_HELD_OUT = ("mushroom", "sailboat")
"""What the prompts of configs/quickstart.yaml ask for beside what is tuned."""

TEMPLATES = (
    "a {style} icon of {thing}",
    "{name}, {style} icon",
    "{name}, icon in the style of {style}",
    "an icon in the style of {style}, {thing}",
    "a {style} icon, {thing}",
    "a {style} icon in the style of {other}, {thing}",
)
"""Captions. Words around the placeholder in fine-tuning's prompts are among them, or those prompts break the base."""

WITH_BACKGROUND = (3, 4, 5)
"""Templates that tell of a white background, too; coloured ones all captions tell of."""

STRANGE = (  # noqa: SIM905 (a word a line would be sixty lines)
    "ancient brave calm clever coastal curious daily eager early elegant famous fancy festive formal gentle global "
    "grand happy hidden honest humble jolly kind late lively local loud lucky modern narrow noble northern odd "
    "plain polite proud public quick quiet rapid rare rural secret serious shy silent simple sleepy slow social "
    "solemn southern steady strange stubborn subtle sudden tender tidy tiny urban vivid wild wise young"
).split()
"""Words that mean nothing to the base: with one in place of a style, icons are flat. So new words do not break it."""


@dataclass(frozen=True)
class Split:
    """Which concepts are for what; see the top of this file.

    Args:
        concepts: What the UNet learns.
        tuned: What fine-tuning learns from.
        held_out: What fine-tuning is judged on.
        others: What the VAE alone sees.
    """

    concepts: tuple[str, ...]
    tuned: tuple[str, ...]
    held_out: tuple[str, ...]
    others: tuple[str, ...]

    def seen(self, style: Style) -> list[str]:
        """Returns what is shown in a style to anything that is trained before fine-tuning."""
        if style == "3d":
            return list(self.others)
        return sorted({*self.concepts, *self.others})


def split(names: Sequence[str], tuned: Sequence[str], concepts: int, held_out: int, seed: int) -> Split:
    """Draws from the names of all icons which are for what.

    Args:
        names: Of all icons.
        tuned: Those that fine-tuning has.
        concepts: Number of concepts that the UNet learns, with those of the two next.
        held_out: Number of those that fine-tuning is judged on.
        seed: What the choice follows from. Names of one word are taken, of which few are two views of one thing.

    Raises:
        InputError: There are too few names.
    """
    wanted = [name for name in WANTED_HELD_OUT if name in names and name not in tuned]
    free = sorted(name for name in names if name not in tuned and name not in wanted and " " not in name)
    if missing := [name for name in tuned if name not in names]:
        raise InputError(f"there is no icon of {missing[0]}, which fine-tuning has: take it out of there")
    if concepts > len(free) + len(wanted) + len(tuned) or not 1 <= held_out <= concepts - len(tuned):
        raise InputError(
            f"--concepts {concepts} --held_out {held_out}: there are {len(free) + len(wanted)} names to choose from "
            f"beside the {len(tuned)} of fine-tuning, which are among the concepts"
        )
    random.Random(seed).shuffle(free)
    drawn = [*wanted, *free][: concepts - len(tuned)]
    learned = {*drawn, *tuned}
    return Split(
        concepts=tuple(sorted(learned)),
        tuned=tuple(tuned),
        held_out=tuple(sorted(drawn[:held_out])),
        others=tuple(name for name in names if name not in learned),
    )


def tuned_names(metadata: Path) -> list[str]:
    """Returns the things of a folder of fine-tuning images, by their files: 01-red-apple.webp shows a red apple."""
    rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
    return [Path(row["file_name"]).stem.split("-", 1)[1].replace("-", " ") for row in rows]


def thing(name: str) -> str:
    """Returns a name with its article; plurals have none."""
    if name.endswith("s") and not name.endswith(("ss", "us", "is")):
        return name
    return f"{'an' if name[0] in 'aeiou' and not name.startswith(('uni', 'eu')) else 'a'} {name}"


def captions(name: str, style: str, background: str, dice: random.Random) -> list[str]:
    """Returns what is said of a picture, one caption a template; the last ones of flat icons name strange styles."""
    said = list[str]()
    for number, template in enumerate(TEMPLATES):
        strange = style == "flat" and number in WITH_BACKGROUND
        first, second = dice.sample(STRANGE, 2) if strange else (style, style)
        tail = f", {background} background" if background != "white" or number in WITH_BACKGROUND else ""
        said.append(template.format(name=name, thing=thing(name), style=first, other=second) + tail)
    return said


def on(picture: Image.Image, background: str) -> Image.Image:
    """Lays a picture, RGBA, on a background."""
    ground = Image.new("RGB", picture.size, BACKGROUNDS[background])
    ground.paste(picture, mask=picture)
    return ground


def write_data(
    icons: Icons, merges: Sequence[Pair], folder: Path, tuned: Path, concepts: int, held_out: int, seed: int
) -> Split:
    """Writes all that the later steps read, and nothing that they must not see.

    Args:
        icons: What there is.
        merges: Of CLIP's byte pair encoding.
        folder: Where to write: concepts.json; PARTS, from which the UNet learns; vae/, from which the VAE does, with an
            alpha channel; held_out/, 3d and flat, for judging alone; tokenizer/.
        tuned: The metadata.jsonl of the images that are fine-tuned on.
        concepts: Number of concepts that the UNet learns.
        held_out: Number of concepts that fine-tuning is judged on.
        seed: What all choices follow from.
    """
    chosen = split(icons.names, tuned_names(tuned), concepts, held_out, seed)
    dice = random.Random(f"{seed} pictures")
    rows: dict[str, list[dict[str, str]]] = {part: [] for part in PARTS}
    for name in chosen.concepts:
        pairs = [" and ".join(dice.sample([*RULES, SOFT], 2)) for _ in range(4)]
        shown = [("flat", "flat", "white", side) for side in ORIGINAL_SIDES]
        shown += [("styles", style, "white", dice.choice(ORIGINAL_SIDES)) for style in (*STYLES[1:], *pairs)]
        for style in ("flat", "flat", *STYLES):
            shown.append(("coloured", style, dice.choice(list(BACKGROUNDS)[1:]), dice.choice(ORIGINAL_SIDES)))
        for part, style, background, side in dict.fromkeys(shown):
            rows[part].append(write_picture(icons, folder / part, name, style, background, side, dice))
    for part, table in rows.items():
        write_rows(folder / part, table)
    for style in VAE_STYLES:
        for name in chosen.seen(style):
            save(icons.draw(name, style, SIDE), folder / "vae" / style / f"{slug(name)}.png")
    for style in ("flat", "3d"):
        judged_rows = [judged(icons, folder / "held_out" / style, name, style) for name in chosen.held_out]
        write_rows(folder / "held_out" / style, judged_rows)
    spoken = [row[key] for table in rows.values() for row in table for key in row if key != "file_name"]
    write_tokenizer(folder / "tokenizer", prune(merges, [*spoken, *icons.names, *words_of_configs(ROOT / "configs")]))
    settings = {"seed": seed, **asdict(chosen)}
    write_whole(folder / "concepts.json", lambda part: part.write_text(json.dumps(settings, indent=1) + "\n"))
    return chosen


def read_split(folder: Path) -> Split:
    """Returns what write_data has written.

    Raises:
        InputError: It has not, or not to its end.
    """
    try:
        settings = json.loads((folder / "concepts.json").read_text())
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no concepts.json: run `tiny_base.py data` first") from error
    return Split(**{key: tuple(names) for key, names in settings.items() if key != "seed"})


def write_picture(
    icons: Icons, folder: Path, name: str, style: str, background: str, side: int, dice: random.Random
) -> dict[str, str]:
    """Draws a picture into a folder; returns its row of metadata, one column of captions a template."""
    file = picture_file(name, style, background, side)
    save(on(styled(icons, name, style, side), background), folder / file)
    said = captions(name, style, background, dice)
    return {"file_name": file, **{f"caption_{number}": caption for number, caption in enumerate(said)}}


def picture_file(name: str, style: str, background: str, side: int) -> str:
    """Returns what a picture's file is called."""
    return f"{slug(name)}-{slug(style)}-{slug(background)}-{side}.png"


def judged(icons: Icons, folder: Path, name: str, style: Style) -> dict[str, str]:
    """Draws what fine-tuning is judged on into a folder, captioned as data/icons3d is; returns its row of metadata."""
    file = f"{slug(name)}.png"
    save(on(icons.draw(name, style, ORIGINAL_SIDES[1]), "white"), folder / file)
    return {"file_name": file, "prompt": f"a {style} icon in the style of TOK, {thing(name)}, white background"}


def save(picture: Image.Image, path: Path) -> None:
    """Writes a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table as the ImageFolder of `datasets` has it."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def words_of_configs(folder: Path) -> list[str]:
    """Returns all text in the configs and in the metadata of data/: prompts among it, and all that is asked for."""
    texts = [text for path in sorted(folder.glob("*.yaml")) for text in strings(yaml.safe_load(path.read_text()))]
    tables = sorted((folder.parent / "data").rglob("metadata.jsonl"))
    rows = [json.loads(line) for path in tables for line in path.read_text(encoding="utf-8").splitlines()]
    return [text for text in [*texts, *(text for row in rows for text in strings(row))] if " " in text]


def strings(value: Any) -> Iterable[str]:
    """Yields all text in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings(list(value.values()))
    elif isinstance(value, list):
        for part in value:
            yield from strings(part)


def slug(name: str) -> str:
    """Returns a name as files have it."""
    return name.replace(" ", "-")
