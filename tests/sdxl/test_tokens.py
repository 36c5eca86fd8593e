from pathlib import Path

import pytest
import torch

from lit_edm.errors import InputError
from lit_edm.sdxl import Placeholders, SDXLCheckpoint
from lit_edm.sdxl.tokens import ExtendedEmbedding, add_tokens


def test_tokens_are_numbered_through() -> None:
    placeholders = Placeholders({"TOK": 2, "HAT": 1})
    assert placeholders.tokens == {"TOK": ["<s0>", "<s1>"], "HAT": ["<s2>"]}
    assert placeholders.names == ["<s0>", "<s1>", "<s2>"]


@pytest.mark.parametrize(
    ("text", "replaced"),
    [
        ("a photo of TOK", "a photo of <s0><s1>"),
        ("TOK, TOK. (TOK)", "<s0><s1>, <s0><s1>. (<s0><s1>)"),
        ("TOKEN TOKS myTOK tok TOK_1", "TOKEN TOKS myTOK tok TOK_1"),
        ("TOK2 TOK", "<s2> <s0><s1>"),
        ("TOK TOK hat", "<s3> hat"),
        ("a $x", "a <s4>"),
        ("nothing", "nothing"),
    ],
)
def test_whole_words_longest_first(text: str, replaced: str) -> None:
    placeholders = Placeholders({"TOK": 2, "TOK2": 1, "TOK TOK": 1, "$x": 1})
    assert placeholders.replace(text) == replaced


def test_without_placeholders_captions_stay() -> None:
    assert Placeholders({}).replace("a photo of TOK") == "a photo of TOK"
    assert Placeholders({}).absent_from(["x"]) == []


def test_absent_words_are_found() -> None:
    assert Placeholders({"TOK": 1, "HAT": 1}).absent_from(["a TOK", "a HATS"]) == ["HAT"]


@pytest.mark.parametrize("counts", [{"TOK": 0}, {" ": 1}])
def test_impossible_placeholders(counts: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"model\.init_args\.tokens"):
        Placeholders(counts)


@pytest.mark.parametrize("index", [0, 1])
def test_only_new_rows_are_trained_and_old_tokens_embed_as_before(tiny: Path, index: int) -> None:
    checkpoint = SDXLCheckpoint(str(tiny))
    tokenizer, encoder = checkpoint.load_tokenizers()[index], checkpoint.load_text_encoders(torch.float32)[index]
    ids = torch.tensor(tokenizer("a photo of a cat", padding="max_length").input_ids)[None]
    before = encoder(ids).last_hidden_state
    embedding = add_tokens(tokenizer, encoder, Placeholders({"TOK": 2}), {})
    torch.testing.assert_close(encoder(ids).last_hidden_state, before, rtol=0, atol=0)
    assert [name for name, p in encoder.named_parameters() if p.requires_grad] == [
        name for name, p in encoder.named_parameters() if p is embedding.rows
    ]
    assert embedding.rows.shape == (2, encoder.config.hidden_size)
    new = tokenizer("<s0> <s1>", add_special_tokens=False).input_ids
    assert new == [514, 515]
    embedding(torch.tensor([[3, *new]])).sum().backward()
    assert embedding.table.weight.grad is None
    torch.testing.assert_close(embedding.rows.grad, torch.ones_like(embedding.rows))
    torch.testing.assert_close(embedding(torch.tensor(new)), embedding.rows)


def test_rows_stay_float32_over_a_half_precision_table() -> None:
    embedding = ExtendedEmbedding(torch.nn.Embedding(4, 8, dtype=torch.bfloat16), torch.randn(2, 8), first_id=4)
    assert embedding.rows.dtype == torch.float32
    assert embedding(torch.tensor([0, 5])).dtype == torch.bfloat16


def test_random_rows_have_the_tables_std(tiny: Path) -> None:
    checkpoint = SDXLCheckpoint(str(tiny))
    tokenizer, encoder = checkpoint.load_tokenizers()[0], checkpoint.load_text_encoders(torch.float32)[0]
    std = encoder.get_input_embeddings().weight.std()
    rows = add_tokens(tokenizer, encoder, Placeholders({"TOK": 500}), {}).rows
    torch.testing.assert_close(rows.std(), std, rtol=0.05, atol=0)
    assert rows.mean().abs() < 0.05 * std


def test_rows_start_from_the_initializers_tokens_in_turn(tiny: Path) -> None:
    checkpoint = SDXLCheckpoint(str(tiny))
    tokenizer, encoder = checkpoint.load_tokenizers()[0], checkpoint.load_text_encoders(torch.float32)[0]
    table = encoder.get_input_embeddings().weight.clone()
    ids = tokenizer("ab", add_special_tokens=False).input_ids
    rows = add_tokens(tokenizer, encoder, Placeholders({"TOK": 3}), {"TOK": "ab"}).rows
    torch.testing.assert_close(rows, table[[ids[0], ids[1], ids[0]]], rtol=0, atol=0)


def test_a_base_with_learned_tokens_is_refused(tiny: Path) -> None:
    checkpoint = SDXLCheckpoint(str(tiny))
    tokenizer, encoder = checkpoint.load_tokenizers()[0], checkpoint.load_text_encoders(torch.float32)[0]
    tokenizer.add_tokens(["<s0>"])
    with pytest.raises(InputError, match="already has one of <s0>"):
        add_tokens(tokenizer, encoder, Placeholders({"TOK": 1}), {})
