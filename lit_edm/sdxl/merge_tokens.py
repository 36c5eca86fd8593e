"""New tokens of several adapters side by side: what each is called in the result."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from lit_edm.errors import InputError
from lit_edm.sdxl.updates import AdapterWeights


@dataclass(frozen=True)
class RenamedTokens:
    """The tokens of a placeholder of one adapter, and what they are called beside those of the others.

    Args:
        path: File of the adapter.
        old_word: The placeholder there.
        old_tokens: Its tokens there, such as <s0><s1>.
        word: The placeholder in the result.
        tokens: Its tokens in the result.
    """

    path: str
    old_word: str
    old_tokens: str
    word: str
    tokens: str


def renamed_tokens(adapters: Mapping[str, AdapterWeights]) -> list[RenamedTokens]:
    """Returns the tokens of all adapters, numbered through in their order; a word taken already gets a number.

    Two adapters that learned TOK as <s0><s1> become TOK, <s0><s1>, and TOK2, <s2><s3>.
    """
    renamed: list[RenamedTokens] = []
    start = 0
    for path, adapter in adapters.items():
        old_start = 0
        for word, number in words_of(adapter).items():
            taken = {tokens.word for tokens in renamed}
            new = next(name for name in numbered(word) if name not in taken)
            renamed.append(RenamedTokens(path, word, named(old_start, number), new, named(start, number)))
            old_start, start = old_start + number, start + number
    return renamed


def joined_placeholders(adapters: Mapping[str, AdapterWeights]) -> dict[str, int]:
    """Returns the number of tokens of each placeholder of the result, in their order."""
    return {tokens.word: tokens.tokens.count("<") for tokens in renamed_tokens(adapters)}


def joined_embeddings(adapters: Mapping[str, AdapterWeights]) -> dict[str, Tensor]:
    """Returns the embeddings of all tokens in that order, clip_l (N, D1) and clip_g (N, D2); nothing if none is new.

    Raises:
        InputError: The adapters are of different bases.
    """
    learned = {path: adapter.embeddings for path, adapter in adapters.items() if adapter.embeddings}
    first = next(iter(learned), "")
    for path, embeddings in learned.items():
        for encoder, rows in embeddings.items():
            if rows.shape[1] != (width := learned[first][encoder].shape[1]):
                raise InputError(
                    f"{path}: embeddings {encoder} are of {rows.shape[1]} numbers, but of {width} in {first}; "
                    "only adapters of one base can be merged"
                )
    encoders = learned[first] if learned else ()
    return {name: torch.cat([embeddings[name] for embeddings in learned.values()]) for name in encoders}


def words_of(adapter: AdapterWeights) -> Mapping[str, int]:
    """Returns the number of tokens of each placeholder; TOK is taken for one that a file does not name."""
    rows = len(next(iter(adapter.embeddings.values()), ()))
    return adapter.tokens if adapter.tokens or not rows else {"TOK": rows}


def numbered(word: str) -> Iterator[str]:
    """Yields a word, then the word with 2, 3 and so on after it."""
    yield word
    yield from (f"{word}{number}" for number in count(2))


def named(start: int, number: int) -> str:
    """Returns names of tokens, one after the other: <s2><s3>."""
    return "".join(f"<s{index}>" for index in range(start, start + number))
