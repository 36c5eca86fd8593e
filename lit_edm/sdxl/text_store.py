"""Encoded texts that are kept, so that no text is encoded twice while the encoders stay as they are."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_edm.cache import TensorCache

Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""Maps texts to context (B, L, D) and pooled embedding (B, P)."""

TEXTS_AT_ONCE = 16
"""Texts that are encoded together where many are to be kept."""


@dataclass(frozen=True)
class TextStore:
    """Keeps the context and the pooled embedding of texts.

    Args:
        cache: Where they are kept.
        settings: Names the encoders, weights included.
    """

    cache: TensorCache
    settings: str = ""

    def fill(self, texts: Sequence[str], encode: Encode) -> None:
        """Encodes the texts that are not kept yet, and keeps them."""
        missing = self.missing(texts)
        for start in range(0, len(missing), TEXTS_AT_ONCE):
            some = missing[start : start + TEXTS_AT_ONCE]
            for text, context, pooled in zip(some, *encode(some), strict=True):
                self.cache.put(self._key(text), {"context": context, "pooled": pooled})

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Returns those of the texts that are not kept yet, each once."""
        return [text for text in dict.fromkeys(texts) if self._key(text) not in self.cache]

    def read(self, texts: Sequence[str], encode: Encode, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns context (B, L, D) and pooled embedding (B, P) on the device.

        Texts that are not kept are encoded and not kept then either: shuffled tags would fill any memory.
        """
        found = [self.cache.get(self._key(text)) for text in texts]
        kept = [tensors for tensors in found if tensors is not None]
        if len(kept) < len(texts):
            return encode(texts)
        context, pooled = (torch.stack([tensors[name] for tensors in kept]) for name in ("context", "pooled"))
        return context.to(device, non_blocking=True), pooled.to(device, non_blocking=True)

    def _key(self, text: str) -> str:
        return json.dumps(["text", text, self.settings])
