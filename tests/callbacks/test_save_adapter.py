from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lit_edm.callbacks import SaveAdapter, ValidationImages
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.edm import EulerSampler
from lit_edm.modules import SDXLModule
from lit_edm.sdxl import Adapter, FullFinetune, LoKr, LoRA
from lit_edm.sdxl.export import lora_state_dict


def fit(
    tiny: Path,
    icons: Path,
    root: Path,
    *callbacks: Any,
    tokens: dict[str, int] | None = None,
    adapter: Adapter | None = LoRA(rank=2),
    text_encoder_adapter: Adapter | None = None,
) -> SDXLModule:
    module = SDXLModule(str(tiny), tokens=tokens, adapter=adapter, text_encoder_adapter=text_encoder_adapter)
    trainer = Trainer(
        max_steps=4,
        callbacks=list(callbacks),
        logger=False,
        accelerator="cpu",
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    trainer.fit(module, CaptionedImagesDataModule(icons, resolution=16, batch_size=4))
    return module


def test_writes_at_the_end_and_with_each_checkpoint(tiny: Path, icons: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    module = fit(
        tiny,
        icons,
        tmp_path,
        SaveAdapter("icons"),  # before the pictures it copies: the order of callbacks must not matter
        ValidationImages(["TOK, a rocket"], resolution=16, sampler=EulerSampler(1)),
        ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1),
        tokens={"TOK": 2},
    )
    folder = tmp_path / "adapter"
    names = {"pytorch_lora_weights.safetensors", "icons_emb.safetensors", "README.md", "config.yaml", "sample_00.png"}
    assert {path.name for path in folder.iterdir()} == names | {"step_000002", "step_000004"}
    for path in (folder, folder / "step_000004"):
        saved, live = load_file(path / "pytorch_lora_weights.safetensors"), lora_state_dict(module.denoiser.unet)
        assert saved.keys() == live.keys()
        assert all(saved[name].equal(live[name]) for name in live)
        embeddings = load_file(path / "icons_emb.safetensors")
        assert all(embeddings[name].equal(rows) for name, rows in module.conditioner.new_embeddings().items())
    halfway = load_file(folder / "step_000002" / "pytorch_lora_weights.safetensors")
    assert any(not halfway[name].equal(value) for name, value in saved.items())
    checkpoint = torch.load(tmp_path / "checkpoints" / "epoch=0-step=2.ckpt")["state_dict"]
    rows = checkpoint["conditioner.encoders.0.embeddings.token_embedding.rows"]
    assert load_file(folder / "step_000002" / "icons_emb.safetensors")["clip_l"].equal(rows)
    last = tmp_path / "images" / "step_000004" / "00.png"
    assert (folder / "sample_00.png").read_bytes() == last.read_bytes()
    assert (folder / "config.yaml").read_text() == "seed_everything: 0\n"
    card = (folder / "README.md").read_text()
    assert "<s0><s1>, a rocket" in card
    assert "seed_everything: 0" in card


def test_without_tokens_pictures_or_config(tiny: Path, icons: Path, tmp_path: Path) -> None:
    fit(tiny, icons, tmp_path, SaveAdapter())
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"pytorch_lora_weights.safetensors", "README.md"}


@pytest.mark.parametrize(
    ("adapter", "text_encoder_adapter", "files"),
    [
        (LoKr(rank=2), None, {"x_lycoris.safetensors"}),
        (LoRA(rank=2), FullFinetune(), {"pytorch_lora_weights.safetensors", "text_encoder", "text_encoder_2"}),
        (FullFinetune(("mid_block",)), None, {"unet"}),
        (None, LoRA(rank=2), {"pytorch_lora_weights.safetensors"}),
    ],
)
def test_writes_what_is_trained(
    tiny: Path,
    icons: Path,
    tmp_path: Path,
    adapter: Adapter | None,
    text_encoder_adapter: Adapter | None,
    files: set[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    fit(tiny, icons, tmp_path, SaveAdapter("x"), adapter=adapter, text_encoder_adapter=text_encoder_adapter)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == files | {"README.md"}
    said = caplog.messages[-1]
    assert all(f"{tmp_path / 'adapter' / name}" in said for name in files)
    assert ("LyCORIS" in said) == isinstance(adapter, LoKr)


def test_ends_by_saying_where_the_files_are_and_how_to_use_them(
    tiny: Path, icons: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fit(tiny, icons, tmp_path, SaveAdapter("icons"), tokens={"TOK": 1})
    said = caplog.messages[-1]
    for name in ("pytorch_lora_weights.safetensors", "icons_emb.safetensors", "README.md"):
        assert str(tmp_path / "adapter" / name) in said
    assert "pipe.load_lora_weights(" in said
