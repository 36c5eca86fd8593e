import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests load local folders, with the real code

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_edm.batch import Batch
from lit_edm.data.labelled import LabelledImagesDataModule
from lit_edm.modules import EDMModule, SmallUNet
from lit_edm.sdxl.tiny import make_tiny_sdxl

torch.set_num_threads(1)  # the tests' networks are smaller than the cost of sharing them out


@pytest.fixture(autouse=True)
def no_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets each test begin without the run's seed that another has left, whatever order they come in."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


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


class NoisyPatches(LabelledImagesDataModule):
    """Eleven images, 1 x 4 x 4, of three classes, seven of them trained on: numbers that no batch size divides."""

    def __init__(self, batch_size: int = 3, held_out: float = 4 / 11, num_workers: int = 0) -> None:
        super().__init__(held_out, batch_size, num_workers, seed=0)
        self.image_shape = (1, 4, 4)
        self.class_names = ["dark", "grey", "light"]

    def read(self) -> tuple[Any, Any]:
        pixels = torch.rand(11, 1, 4, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
        examples = [{"image": image, "label": index % 3} for index, image in enumerate(pixels)]
        return examples, examples


@pytest.fixture
def patches() -> type[NoisyPatches]:
    """A data module of labelled images."""
    return NoisyPatches


@pytest.fixture
def pixels() -> Callable[..., EDMModule]:
    """Makes a module for those images whose network no longer has layers of zeros: all of it has an effect."""

    def make(**settings: Any) -> EDMModule:
        torch.manual_seed(0)
        network = SmallUNet(1, 3, channels=8, multipliers=(1, 2))
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d) and not layer.weight.any():
                torch.nn.init.normal_(layer.weight, std=0.03)
        return EDMModule(network, **({"image_shape": (1, 4, 4), "num_classes": 3} | settings))

    return make


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a quiet trainer on the CPU."""

    def make(*callbacks: Callback, **settings: Any) -> Trainer:
        defaults = {"max_steps": 4, "logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
        quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        return Trainer(callbacks=list(callbacks), **(defaults | quiet | settings))

    return make


class StandInHub:
    """Stands in for the Hub's client: what is sent to it is there for the real one, which reads its cache offline.

    Args:
        cache: Where the client looks for what it has downloaded.
    """

    user = "someone"
    clubs = ("club",)

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.made: dict[str, dict[str, Any]] = {}

    def __call__(self) -> "StandInHub":
        return self

    def whoami(self) -> dict[str, Any]:
        return {"name": self.user, "orgs": [{"name": name} for name in self.clubs]}

    def create_repo(self, repo_id: str, **settings: Any) -> str:
        self.made[repo_id] = settings
        return f"https://hub.test/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: Path, ignore_patterns: list[str], commit_message: str) -> None:
        from huggingface_hub.utils import filter_repo_objects

        assert repo_id in self.made
        (self.folder(repo_id).parents[1] / "refs").mkdir(parents=True, exist_ok=True)
        (self.folder(repo_id).parents[1] / "refs/main").write_text(self.folder(repo_id).name)
        files = (str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file())
        for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            (self.folder(repo_id) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder_path / name, self.folder(repo_id) / name)

    def folder(self, repo_id: str) -> Path:
        """Where the files of a repository are."""
        return self.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / ("0" * 40)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandInHub:
    """A Hub of our own, to which nobody sends anything else."""
    hub = StandInHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.cache))
    return hub
