"""Markdown of words that others chose: prompts, names and configs that must show as they are, and break nothing."""

import re
from collections.abc import Iterable, Sequence

SPECIAL = re.compile(r"([\\`*_\[\]<>|#&~$])")
"""What means something in the middle of a line: emphasis, links, HTML, cells, entities, formulas."""

UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What is not seen and does something: it steers terminals, or turns the direction of what stands around it."""


def as_cell(text: str) -> str:
    """Escapes words for a cell of a table, or for a heading: one line that shows what was written."""
    return one_line(SPECIAL.sub(r"\\\1", text))


def as_code(text: str) -> str:
    """Marks words as code within a line, whatever backticks they have themselves."""
    line = one_line(text)
    ticks = "`" * (longest_run("`", line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def one_line(text: str) -> str:
    """Returns words with single blanks between them, and a sign in place of what is not seen."""
    return UNSEEN.sub("\ufffd", " ".join(text.split()))


def fenced(text: str, language: str) -> str:
    """Marks lines as code, with a fence that is in none of them."""
    fence = "`" * max(3, longest_run("`", text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lays out cells, which are Markdown already."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def longest_run(character: str, text: str) -> int:
    """Returns how often a character follows itself at most."""
    return max((len(run) for run in re.findall(f"{re.escape(character)}+", text)), default=0)
