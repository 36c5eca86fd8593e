"""What users wrote shows as they wrote it: read by another program's parser of Markdown."""

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from lit_edm.sdxl.markdown import as_cell, as_code, fenced, table

HOSTILE = [
    "a | b\n# c <img>",
    "```\n---\n# not a heading\n```",
    "`tick` at both ends`",
    "<script>alert(1)</script> &lt; & \\| \\",
    "[link](http://x.y) ![](x.png) **bold** _it_ ~~gone~~ $x$",
    "```` four ``` three",
    "- item",
]


def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_shows_the_words_and_nothing_else(text: str) -> None:
    tokens = parsed(table(("prompt", "x"), [(as_cell(text), "y")]))
    cells = [token.children or [] for token in tokens if token.type == "inline"]
    assert len(cells) == 4
    assert {child.type for child in cells[2]} <= {"text", "text_special"}
    assert "".join(child.content for child in cells[2]) == " ".join(text.split())
    assert [child.content for child in cells[3]] == ["y"]


@pytest.mark.parametrize("text", HOSTILE)
def test_code_in_a_line_is_one_piece(text: str) -> None:
    _, line, _ = parsed(f"x {as_code(text)} y")
    before, code, after = line.children or ()
    assert (before.content, code.type, after.content) == ("x ", "code_inline", " y")
    assert code.content == " ".join(text.split())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_fence_ends_where_it_should(text: str) -> None:
    fence, *after = parsed(f"{fenced(text, 'yaml')}\n\nafter")
    assert (fence.type, fence.info) == ("fence", "yaml")
    assert fence.content == f"{text}\n"
    assert [token.type for token in after] == ["paragraph_open", "inline", "paragraph_close"]
