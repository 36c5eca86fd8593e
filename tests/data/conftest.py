import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves an image in the temporary folder: a plain one, unless another is given."""

    def save(name: str, image: Image.Image | None = None, **options: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (image or Image.new("RGB", (12, 8), "red")).save(path, **options)
        return path

    return save


@pytest.fixture
def write_metadata(tmp_path: Path) -> Callable[..., Path]:
    """Writes metadata.jsonl, one row an argument; strings are written as they are."""

    def write(*rows: object) -> Path:
        path = tmp_path / "metadata.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return write


@pytest.fixture
def positions() -> Callable[[int, int], Image.Image]:
    """Makes images whose red is the column and whose green is the row of each pixel."""

    def draw(width: int, height: int) -> Image.Image:
        row, column = np.mgrid[:height, :width].astype(np.uint8)
        return Image.fromarray(np.stack([column, row, np.zeros_like(row)], axis=-1))

    return draw
