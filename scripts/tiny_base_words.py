"""CLIP's tokenizer, cut down to the words that are wanted: they become the very tokens that CLIP makes of them."""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

Pair = tuple[str, str]

CONTEXT = 32
"""Tokens of a caption that the text encoders read, both marks included."""


def byte_symbols() -> list[str]:
    """Returns the 256 letters that stand for bytes, in CLIP's order: those that can be printed first."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(byte) for byte in printed] + [chr(256 + n) for n in range(256 - len(printed))]
    assert set(symbols) == set(ByteLevel.alphabet())
    return symbols


def vocabulary(merges: Sequence[Pair]) -> dict[str, int]:
    """Returns the id of each token, in CLIP's order: bytes, bytes that end a word, merged ones, and two marks.

    The first is "!", with which SDXL's second tokenizer pads, and the last is the end of text, where CLIP pools.
    """
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    return {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def write_tokenizer(folder: Path, merges: Sequence[Pair]) -> None:
    """Writes the two files that CLIPTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> Any:
    """Returns the tokenizer of a folder, which pads with a token of one's choice."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder, pad_token=pad_token, model_max_length=CONTEXT)


def prune(merges: Sequence[Pair], texts: Iterable[str]) -> list[Pair]:
    """Returns the merges, in their order, that byte pair encoding uses on the words of texts.

    With these alone it makes the same tokens of these words: of the pairs that it could merge next, the first in order
    is among them at each step. Other words fall apart into more tokens.
    """
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), [])
        backend = read_tokenizer(Path(folder)).backend_tokenizer
    normal = (backend.normalizer.normalize_str(text) for text in set(texts))
    words = {word for text in normal for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)}
    rank = {pair: number for number, pair in enumerate(merges)}
    used = {pair for word in words for pair in merged(word, rank)}
    return [pair for pair in merges if pair in used]


def merged(word: str, rank: dict[Pair, int]) -> list[Pair]:
    """Returns the pairs that byte pair encoding merges in a word, one after the other."""
    parts, pairs = [*word[:-1], f"{word[-1]}</w>"], list[Pair]()
    while True:
        ranked = [(rank[pair], pair) for pair in pairwise(parts) if pair in rank]
        if not ranked:
            return pairs
        pair = min(ranked)[1]
        pairs.append(pair)
        joined, place = list[str](), 0
        while place < len(parts):
            here = tuple(parts[place : place + 2]) == pair
            joined.append("".join(pair) if here else parts[place])
            place += 2 if here else 1
        parts = joined
