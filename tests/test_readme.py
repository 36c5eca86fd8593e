import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    assert names["loss"].shape == ()
    assert names["loss"].item() > 0
    assert names["drawn"].shape == (4, 2)
    assert torch.isfinite(names["drawn"]).all()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|scripts|docs|lit_edm|data)/[\w./]*\w", README))))
def test_files_it_names_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_commands_it_names_exist() -> None:
    targets = re.findall(r"^([\w/-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make (\w+)", README)) - {"it"} <= set(targets)
