from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folders of images of several shapes, and of a class, that no batch size divides."""
    for folder in ("instance", "class"):
        (tmp_path / folder).mkdir()
        for index, size in enumerate([(24, 16), (16, 16), (16, 20), (32, 16), (16, 30)]):
            Image.effect_noise(size, 40 + index).convert("RGB").save(tmp_path / folder / f"{index}.png")
    return tmp_path
