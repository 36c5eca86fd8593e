import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests load local folders, with the real code

import pytest
import torch

from lit_edm.batch import Batch
from lit_edm.sdxl.tiny import make_tiny_sdxl

torch.set_num_threads(1)  # the tests' networks are smaller than the cost of sharing them out


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL that predicts epsilon."""
    folder = tmp_path_factory.mktemp("tiny") / "sdxl"
    make_tiny_sdxl(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL that predicts v."""
    folder = tmp_path_factory.mktemp("tiny") / "v"
    make_tiny_sdxl(folder, "v_prediction")
    return folder


@pytest.fixture(scope="session")
def tiny_edm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Playground v2.5: EDM-native, with statistics of latents."""
    folder = tmp_path_factory.mktemp("tiny") / "edm"
    make_tiny_sdxl(folder, "edm")
    return folder


@pytest.fixture
def batch() -> Batch:
    """Two captioned images of 16 px."""
    generator = torch.Generator().manual_seed(1)
    return Batch(
        image=torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1,
        caption=["a photo of TOK, a red apple", "TOK"],
        original_size=torch.tensor([[1023, 768], [3001, 2000]]),
        crop_top_left=torch.tensor([[0, 3], [7, 0]]),
    )


@pytest.fixture(scope="session")
def icons() -> Path:
    """The 22 captioned icons of the repository."""
    return Path(__file__).parents[1] / "data" / "icons3d"
