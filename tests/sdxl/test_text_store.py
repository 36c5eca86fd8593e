from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_edm.cache import DiskCache, MemoryCache, TensorCache
from lit_edm.sdxl.text_store import TEXTS_AT_ONCE, TextStore

CPU = torch.device("cpu")


class Encoder:
    """Encodes a text to its length, and counts what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.asked.append(list(texts))
        lengths = torch.tensor([float(len(text)) for text in texts])
        return lengths.view(-1, 1, 1).expand(-1, 3, 2), lengths.view(-1, 1).expand(-1, 5)


@pytest.fixture(params=["memory", "disk"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> TensorCache:
    return MemoryCache() if request.param == "memory" else DiskCache(str(tmp_path))


def test_encodes_each_text_once(cache: TensorCache) -> None:
    encode, store = Encoder(), TextStore(cache)
    store.fill(["aa", "", "aa"], encode)
    for _ in range(2):
        context, pooled = store.read(["aa", "", "aa"], encode, CPU)
        assert context.equal(torch.tensor([2.0, 0, 2]).view(3, 1, 1).expand(3, 3, 2))
        assert pooled.equal(torch.tensor([2.0, 0, 2]).view(3, 1).expand(3, 5))
    assert encode.asked == [["aa", ""]]


def test_texts_of_no_return_are_not_kept(cache: TensorCache) -> None:
    """Of shuffled tags there is no end."""
    encode, store = Encoder(), TextStore(cache)
    store.fill(["a"], encode)
    for _ in range(2):
        assert store.read(["a", "b, c"], encode, CPU)[1][:, 0].tolist() == [1, 4]
    assert encode.asked == [["a"], ["a", "b, c"], ["a", "b, c"]]


def test_many_are_encoded_a_few_at_a_time(cache: TensorCache) -> None:
    encode, texts = Encoder(), ["x" * n for n in range(TEXTS_AT_ONCE + 3)]
    TextStore(cache).fill(texts, encode)
    assert [len(some) for some in encode.asked] == [TEXTS_AT_ONCE, 3]
    assert TextStore(cache).read(texts, encode, CPU)[1][:, 0].tolist() == list(range(TEXTS_AT_ONCE + 3))
    assert len(encode.asked) == 2


def test_other_encoders_have_texts_of_their_own(cache: TensorCache) -> None:
    encode = Encoder()
    for settings in ("one", "two", "one"):
        TextStore(cache, settings).fill(["a"], encode)
    assert encode.asked == [["a"], ["a"]]


def test_kept_while_inferring_and_trained_with_after() -> None:
    store, weight = TextStore(MemoryCache()), torch.ones((), requires_grad=True)
    with torch.inference_mode():
        store.fill(["abc"], Encoder())
    context, _ = store.read(["abc"], Encoder(), CPU)
    (weight * context).sum().backward()
    assert weight.grad == 18
