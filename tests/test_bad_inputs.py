"""Every mistake of docs/bad_inputs.md ends as the page says: with exit code 2 and one line, before anything slow."""

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts/bad_inputs_table.py"))
PAGE = (ROOT / "docs/bad_inputs.md").read_text(encoding="utf-8")
CASES = [case for cases in SCRIPT["CASES"].values() for case in cases]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bases that the cases are about."""
    return SCRIPT["make_bases"](tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.input)
def test_what_the_user_sees(case: Any, bases: Path, tmp_path: Path) -> None:
    ended = SCRIPT["met"](case, bases, tmp_path / "here")
    assert ended.code == 2
    assert case.late or not ended.loaded
    assert case.late or len(ended.lines) == 1, ended.lines  # the libraries' progress bars are before it
    assert SCRIPT["row"](case, ended) in PAGE, "run scripts/bad_inputs_table.py"


def test_what_is_spoilt_works(bases: Path, tmp_path: Path) -> None:
    """Else a case might fail for another reason than its own."""
    for command in SCRIPT["CONFIGS"]:
        SCRIPT["prepare"](tmp_path / command, bases, command)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path / command)
            assert SCRIPT["exit_code"](command, []) == 0


def test_the_page_has_no_other_lines() -> None:
    written = {line.split(" | ")[0].removeprefix("| "): line for line in PAGE.splitlines(keepends=True)}
    rows = {
        topic: [written[f"{case.input}{SCRIPT['star'](case)}"] for case in cases]
        for topic, cases in SCRIPT["CASES"].items()
    }
    assert sum(map(len, rows.values())) >= 100
    assert SCRIPT["page"](rows) == PAGE, "run scripts/bad_inputs_table.py"
