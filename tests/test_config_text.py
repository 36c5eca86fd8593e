from pathlib import Path

import pytest

from lit_edm.config_text import check_config
from lit_edm.errors import InputError


def write(folder: Path, contents: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return path


@pytest.mark.parametrize(
    "contents",
    [
        "model: SDXLModule\n",
        '{"model": {"class_path": "SDXLModule"}}',
        "tokens: {TOK: 2, TOK2: 2}\nconcepts: [{root: a}, {root: b}]\nwords: café\n",
        "one: &one {a: 1, b: 2}\nother: {<<: *one, b: 3}\nagain: {<<: *one}\nsame: *one\n",
        "&all\nitself: *all\n",
    ],
)
def test_what_is_right_passes(tmp_path: Path, contents: str) -> None:
    check_config(write(tmp_path, contents))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("model:\n  class_path: X\n init_args: 3\n", r"config\.yaml, line 3: not YAML \(.*\): correct it$"),
        ("model: [1, 2\n", r"config\.yaml, line 2: not YAML"),
        ("model: *nothing\n", r"config\.yaml, line 1: not YAML \(found undefined alias"),
        ("model: !!python/name:os.system\n", r"config\.yaml, line 1: not YAML \(could not determine a constructor"),
        (b"model: caf\xe9\n", r"config\.yaml is not UTF-8 text: save it as UTF-8$"),
        (b"model: \x00\n", r"config\.yaml: not YAML \(control characters are not allowed\)"),
        ("", r"config\.yaml: holds no keys; write some"),
        ("- model\n", r"config\.yaml: holds no keys; write some"),
        ("a: 1\nb: 2\na: 3\n", r"config\.yaml, line 3: a is in line 1 too: keep one of them$"),
        ("a:\n- b:\n    {TOK: 1, HAT: 1, TOK: 2}\n", r"line 3: TOK is in line 3 too"),
        ("one: &one {a: 1, a: 2}\nother: *one\n", r"line 1: a is in line 1 too"),
    ],
)
def test_says_what_is_wrong_and_where(tmp_path: Path, contents: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_config(write(tmp_path, contents))
