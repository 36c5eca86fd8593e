"""What is said of images: text files beside them, columns of tables, and the changes that training makes."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_edm.errors import InputError

SIDECARS = (".txt", ".caption")
USUAL_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class CaptionRules:
    """Changes a caption each time it is shown.

    Args:
        prefix: What is put in front of every caption, with a space between.
        dropout: Share of the captions shown that are empty instead, prefix and all, in [0, 1); it teaches the network
            what guidance (Ho and Salimans 2022) needs, to denoise without a caption.
        shuffle_tags: Take captions for lists of tags and shuffle these.
        keep_tags: Tags at the start that stay where they are.
        separator: What stands between tags.

    Raises:
        InputError: A setting is out of its range or has no effect.
    """

    prefix: str = ""
    dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tags: int = 0
    separator: str = ","

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise InputError(f"data.init_args.caption_dropout is {self.dropout}: give a share in [0, 1)")
        if self.keep_tags < 0:
            raise InputError(f"data.init_args.keep_tags is {self.keep_tags}: give at least 0")
        if self.keep_tags and not self.shuffle_tags:
            raise InputError("data.init_args.keep_tags has no effect: set data.init_args.shuffle_tags too or leave it")
        if not self.separator:
            raise InputError("the separator of tags is empty: give what stands between tags")

    def __call__(self, caption: str, generator: torch.Generator) -> str:
        """Returns the caption as it is shown, which follows from it and from the generator alone."""
        if self.dropout and torch.rand((), generator=generator) < self.dropout:
            return ""
        return self._prefixed(self._shuffle(caption, generator) if self.shuffle_tags else caption)

    @property
    def varies(self) -> bool:
        """Whether captions take more forms than can be listed."""
        return self.shuffle_tags

    def listed(self, caption: str) -> list[str]:
        """Returns every form of a caption, unless it varies."""
        return [self._prefixed(caption), ""] if self.dropout else [self._prefixed(caption)]

    def _prefixed(self, caption: str) -> str:
        return f"{self.prefix.rstrip()} {caption}" if self.prefix else caption

    def _shuffle(self, caption: str, generator: torch.Generator) -> str:
        tags = [tag.strip() for tag in caption.split(self.separator) if tag.strip()]
        kept, rest = tags[: self.keep_tags], tags[self.keep_tags :]
        order = torch.randperm(len(rest), generator=generator).tolist()
        return f"{self.separator} ".join(kept + [rest[index] for index in order])


def read_sidecar(image: Path) -> str | None:
    """Returns what stands in the text file of an image's name, or None where there is no such file."""
    paths = [path for suffix in SIDECARS if (path := image.with_suffix(suffix)).is_file()]
    if not paths:
        return None
    if len(paths) > 1:
        raise InputError(f"{image} has two captions, {paths[0].name} and {paths[1].name}: delete one of them")
    caption = read_text(paths[0]).strip()
    if not caption:
        raise InputError(f"{paths[0]} is empty: write the caption of {image.name} into it")
    return caption


def find_caption_column(place: str, columns: Collection[str]) -> str:
    """Returns the column that holds captions: the only one, or the only one called text, caption or prompt.

    Args:
        place: What messages call the table.
        columns: Those of its columns that hold text, without those that name files.
    """
    candidates = list(columns) if len(columns) == 1 else [name for name in USUAL_COLUMNS if name in columns]
    if len(candidates) != 1:
        raise InputError(
            f"{place}: cannot tell which column holds the captions, of those with text in them ({listed(columns)}): "
            "name it in data.init_args.caption_column"
        )
    return candidates[0]


def read_text(path: Path) -> str:
    """Returns the contents of a UTF-8 text file."""
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors begin UTF-8 with a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): let yourself read it, or delete it") from error


def listed(names: Collection[str]) -> str:
    """Returns names as messages list them."""
    return ", ".join(names) or "none"
