"""Everything with everything: what is trained, base, prior, cache, adapter, batch size. Two steps each."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from PIL import Image
from torch import Tensor

from lit_edm.cache import MemoryCache
from lit_edm.callbacks import FreezeEmbeddings
from lit_edm.data import CaptionedImagesDataModule, ClassImages, Prior, TeacherPrior
from lit_edm.edm import EDMLoss, EDMWeighting, LogNormal, MinSNRWeighting, UniformTimesteps
from lit_edm.modules import SDXLModule
from lit_edm.sdxl import Adapter, DoRA, LoRA

LOSSES = {
    "tiny": EDMLoss(UniformTimesteps(), MinSNRWeighting(5.0, 1.0)),
    "tiny_v": EDMLoss(UniformTimesteps(), MinSNRWeighting(5.0, 1.0)),
    "tiny_edm": EDMLoss(LogNormal(), EDMWeighting(0.5)),
}
TRAINED = {"frozen": {"unet"}, "text": {"unet", "text_encoders"}, "pivotal": {"unet", "embeddings"}}
ADAPTERS = {"lora": LoRA(rank=2), "dora": DoRA(rank=2)}
PRIORS = ("none", "folder", "teacher")


class Recorder(Callback):
    """Keeps the losses, all values before training, and which of them each step changed."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.moved: list[set[str]] = []

    def on_train_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        self.values = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: SDXLModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        now = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        self.moved.append({name for name, value in now.items() if not value.equal(self.values[name])})
        self.values = now


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Three pictures to learn and two of their class, of several sizes."""
    root = tmp_path_factory.mktemp("matrix")
    for name, sizes in {"instance": [(24, 16), (16, 16), (16, 20)], "class": [(20, 20), (16, 24)]}.items():
        (root / name).mkdir()
        for index, size in enumerate(sizes):
            pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(index))
            Image.fromarray(pixels.byte().numpy()).save(root / name / f"{index}.png")
    return root / "instance", root / "class"


def prior_of(kind: str, folder: Path) -> Prior | None:
    match kind:
        case "folder":
            return ClassImages(root=str(folder), prompt="an icon", weight=0.5)
        case "teacher":
            return TeacherPrior(prompt="an icon", weight=0.5)
    return None


def train(
    base: Path, trained: str, adapter: Adapter, data: CaptionedImagesDataModule, cached: bool, loss: EDMLoss
) -> Any:
    seed_everything(1, verbose=False)
    module = SDXLModule(
        str(base),
        tokens={"TOK": 2} if trained == "pivotal" else None,
        adapter=adapter,
        text_encoder_adapter=adapter if trained == "text" else None,
        loss=loss,
        text_cache=MemoryCache() if cached else None,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    )
    recorder = Recorder()
    phases = [FreezeEmbeddings(0.5)] if trained == "pivotal" else []
    Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*phases, recorder],
    ).fit(module, data)
    return module, recorder


def group_of(name: str) -> str:
    if name.endswith(".rows"):
        return "embeddings"
    return "unet" if name.startswith("denoiser.") else "text_encoders"


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("base", "prior"), product(LOSSES, PRIORS))
@pytest.mark.parametrize("trained", TRAINED)
def test_trains_what_it_should_and_cached_as_uncached(
    trained: str,
    base: str,
    prior: str,
    adapter: str,
    batch_size: int,
    folders: tuple[Path, Path],
    request: pytest.FixtureRequest,
) -> None:
    ends: list[dict[str, Tensor]] = []
    losses: list[list[float]] = []
    for cached in (False, True):
        data = CaptionedImagesDataModule(
            str(folders[0]),
            resolution=16,
            instance_prompt="an icon of TOK",
            prior=prior_of(prior, folders[1]),
            batch_size=batch_size,
            latent_cache=MemoryCache() if cached else None,
        )
        folder = request.getfixturevalue(base)
        module, recorder = train(folder, trained, ADAPTERS[adapter], data, cached, LOSSES[base])
        assert torch.isfinite(torch.tensor(recorder.losses)).all()
        learns = {name: group_of(name) for name, p in module.named_parameters() if p.requires_grad}
        first, second = recorder.moved
        assert {learns.get(name, name) for name in first} == TRAINED[trained]
        assert {learns.get(name, name) for name in second} == TRAINED[trained] - {"embeddings"}
        never = {name for name in learns if name not in first | second}
        assert all("lora_A" in name for name in never), never  # its gradient is B's, which starts at 0, times something
        ends.append({name: recorder.values[name] for name in learns})
        losses.append(recorder.losses)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-6)
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=2.1e-3, msg=name)  # Adam's first steps are signs
