import pickle

from lit_edm.errors import InputError


def test_a_message_steers_no_terminal() -> None:
    """Neither by codes nor by marks of direction in the names of files and in captions; words of all languages stay."""
    said = str(InputError("a\x1b[2J\x07\r.png, \u202egnp.b, 雪の城　Schloß\nb"))
    assert said == "a\\x1b[2J\\x07\\r.png, \\u202egnp.b, 雪の城　Schloß\nb"
    assert str(pickle.loads(pickle.dumps(InputError("a\x1b")))) == "a\\x1b"


def test_a_long_message_keeps_its_ends() -> None:
    said = str(InputError(f"caption {'x' * 100_000}: write less"))
    assert len(said) < 2100
    assert said.startswith("caption x")
    assert said.endswith("x: write less")
