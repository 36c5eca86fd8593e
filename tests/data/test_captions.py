from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lit_edm.data.captions import CaptionRules, find_caption_column, read_sidecar
from lit_edm.errors import InputError

Save = Callable[..., Path]


def _drawn(rules: CaptionRules, caption: str, count: int = 400) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [rules(caption, generator) for _ in range(count)]


def test_captions_are_left_alone_by_default() -> None:
    assert set(_drawn(CaptionRules(), " a photo of TOK,red ,")) == {" a photo of TOK,red ,"}


def test_the_same_generator_gives_the_same_caption() -> None:
    rules = CaptionRules("p ", dropout=0.5, shuffle_tags=True)
    assert _drawn(rules, "a, b, c") == _drawn(rules, "a, b, c")


def test_global_randomness_is_neither_used_nor_changed() -> None:
    state = torch.get_rng_state()
    _drawn(CaptionRules(dropout=0.5, shuffle_tags=True), "a, b, c")
    assert torch.equal(torch.get_rng_state(), state)


def test_dropped_captions_are_empty_with_their_prefix() -> None:
    shown = _drawn(CaptionRules("TOK, ", dropout=0.25), "x", 4000)
    assert set(shown) == {"TOK, x", ""}
    assert shown.count("") == pytest.approx(1000, abs=110)  # four standard deviations


def test_tags_are_shuffled_evenly_behind_those_that_are_kept() -> None:
    shown = _drawn(CaptionRules("a picture of ", shuffle_tags=True, keep_tags=2), "TOK ,hat,  a,b , c,", 1200)
    orders = {"a, b, c", "a, c, b", "b, a, c", "b, c, a", "c, a, b", "c, b, a"}
    assert set(shown) == {f"a picture of TOK, hat, {order}" for order in orders}
    assert min(shown.count(caption) for caption in set(shown)) > 140


def test_separator_of_tags() -> None:
    assert set(_drawn(CaptionRules(shuffle_tags=True, separator="|"), "a, b|c")) == {"a, b| c", "c| a, b"}


@pytest.mark.parametrize("rules", [CaptionRules(), CaptionRules("p "), CaptionRules("p ", dropout=0.5)])
def test_listed_captions_are_all_that_is_shown(rules: CaptionRules) -> None:
    assert not rules.varies
    assert set(rules.listed("a, b")) == set(_drawn(rules, "a, b"))


def test_shuffled_captions_vary() -> None:
    assert CaptionRules(shuffle_tags=True).varies


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": -0.1}, r"caption_dropout is -0\.1: give a share in \[0, 1\)"),
        ({"dropout": 1.0}, r"caption_dropout is 1\.0"),
        ({"keep_tags": -1, "shuffle_tags": True}, "keep_tags is -1: give at least 0"),
        ({"keep_tags": 1}, "keep_tags has no effect: set data.init_args.shuffle_tags"),
        ({"separator": ""}, "separator of tags is empty"),
    ],
)
def test_wrong_rules(settings: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CaptionRules(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_text_file_beside_an_image(tmp_path: Path, suffix: str) -> None:
    image = tmp_path / "a.b.jpg"
    assert read_sidecar(image) is None
    (tmp_path / f"a.b{suffix}").write_bytes(b"\xef\xbb\xbf a photo of TOK \r\n")
    assert read_sidecar(image) == "a photo of TOK"


def test_two_text_files_beside_an_image(tmp_path: Path) -> None:
    for suffix in ("txt", "caption"):
        (tmp_path / f"a.{suffix}").write_text("x")
    with pytest.raises(InputError, match=r"a\.png has two captions, a\.txt and a\.caption: delete one"):
        read_sidecar(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_empty_text_file(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_text("\n")
    with pytest.raises(InputError, match=rf"a\{suffix} is empty: .*a\.png"):
        read_sidecar(tmp_path / "a.png")


def test_text_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8 text: save it as UTF-8"):
        read_sidecar(tmp_path / "a.png")


@pytest.mark.parametrize("columns", [["title"], ["artist", "text"], ["caption", "artist", "title"]])
def test_column_of_the_captions(columns: list[str]) -> None:
    assert find_caption_column("a table", columns) in ("title", "text", "caption")


@pytest.mark.parametrize(
    ("columns", "listed"), [(["text", "prompt"], "text, prompt"), (["title", "artist"], "title, artist"), ([], "none")]
)
def test_column_of_the_captions_unclear(columns: list[str], listed: str) -> None:
    with pytest.raises(InputError, match=rf"a table: .*\({listed}\).*data\.init_args\.caption_column"):
        find_caption_column("a table", columns)
