"""New tokens, learned by textual inversion: their names, their place in captions, and their embeddings."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_edm.errors import InputError

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


@dataclass(frozen=True)
class Placeholders:
    """Words in captions that stand for new tokens: with {"TOK": 2}, TOK becomes <s0><s1>.

    Args:
        counts: Number of new tokens of each word.

    Raises:
        InputError: A word is empty or has no token.
    """

    counts: Mapping[str, int]

    def __post_init__(self) -> None:
        for word, count in self.counts.items():
            if not word.strip() or count < 1:
                raise InputError(f"model.init_args.tokens: {word!r} has {count} tokens; write a word, and 1 or more")

    @property
    def tokens(self) -> dict[str, list[str]]:
        """The tokens of each word, numbered through: {"TOK": ["<s0>", "<s1>"], "HAT": ["<s2>"]}."""
        names, start = {}, 0
        for word, count in self.counts.items():
            names[word] = [f"<s{index}>" for index in range(start, start + count)]
            start += count
        return names

    @property
    def names(self) -> list[str]:
        """All new tokens in order: ["<s0>", "<s1>", "<s2>"]."""
        return [name for names in self.tokens.values() for name in names]

    def replace(self, text: str) -> str:
        """Puts the tokens in place of their words: whole words alone, the longest first, so TOK2 is never <s0><s1>2."""
        tokens = self.tokens
        return self._pattern.sub(lambda match: "".join(tokens[match.group()]), text) if tokens else text

    def absent_from(self, captions: Sequence[str]) -> list[str]:
        """Returns the words that no caption holds."""
        found = {word for caption in captions for word in self._pattern.findall(caption)} if self.counts else set()
        return [word for word in self.counts if word not in found]

    @property
    def _pattern(self) -> re.Pattern[str]:
        words = "|".join(re.escape(word) for word in sorted(self.counts, key=len, reverse=True))
        return re.compile(rf"(?<!\w)(?:{words})(?!\w)")


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table with trainable rows for new tokens after it.

    Only the new rows are parameters of the optimizer: nothing has to be put back after a step, weight decay and
    Prodigy's distance see them alone, and a checkpoint holds a few kilobytes.

    Args:
        table: The table of the vocabulary, (V, D).
        rows: Initial embeddings of the new tokens, (N, D).
        first_id: Id of the first new token; the others follow.
    """

    def __init__(self, table: nn.Embedding, rows: Tensor, first_id: int) -> None:
        super().__init__()
        self.table = table.requires_grad_(False)
        self.rows = nn.Parameter(rows.detach().float().clone())
        self.first_id = first_id

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeds ids of any shape (...), giving (..., D) in the precision of the table."""
        is_new = input_ids >= self.first_id
        known = self.table(input_ids.masked_fill(is_new, 0))
        new = functional.embedding((input_ids - self.first_id).clamp(min=0), self.rows)
        return torch.where(is_new[..., None], new.to(known.dtype), known)


def add_tokens(
    tokenizer: "CLIPTokenizer",
    encoder: "CLIPTextModel | CLIPTextModelWithProjection",
    placeholders: Placeholders,
    initializers: Mapping[str, str],
) -> ExtendedEmbedding:
    """Teaches a tokenizer and its text encoder the new tokens.

    Args:
        tokenizer: Gets the names of the tokens.
        encoder: Gets an ExtendedEmbedding in place of its table.
        placeholders: The new tokens.
        initializers: For a placeholder, the words whose embeddings its tokens start from; tokens of other
            placeholders start at random with the standard deviation of the table.

    Raises:
        InputError: A token is in the vocabulary already.
    """
    table = cast(nn.Embedding, encoder.get_input_embeddings())
    rows = torch.cat(
        [initial_rows(tokenizer, table.weight, len(n), initializers.get(w)) for w, n in placeholders.tokens.items()]
    )
    first_id = len(tokenizer)
    if tokenizer.add_tokens(placeholders.names) < len(placeholders.names):
        raise InputError(
            f"model.init_args.tokens: the base's vocabulary already has one of {' '.join(placeholders.names)}; "
            "choose a base without learned tokens"
        )
    embedding = ExtendedEmbedding(table, rows, first_id)
    encoder.set_input_embeddings(embedding)
    return embedding


def initial_rows(tokenizer: "CLIPTokenizer", table: Tensor, count: int, initializer: str | None) -> Tensor:
    """Returns first embeddings (count, D): those of the initializer's tokens in turn, or noise of the table's std."""
    if initializer is None:
        return torch.randn(count, table.shape[1], device=table.device) * table.float().std()
    ids = tokenizer(initializer, add_special_tokens=False).input_ids
    if not ids:
        raise InputError(f"model.init_args.initializers: '{initializer}' has no token; write a word, or leave it out")
    return table[[ids[index % len(ids)] for index in range(count)]].float()
