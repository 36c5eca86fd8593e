from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_edm.callbacks import SaveAdapter, ValidationImages, ValidationLoss
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.edm import EulerSampler
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.sdxl import Adapter, FullFinetune, LoHa, LoKr, LoRA
from lit_edm.sdxl.formats.writing import diffusers_tensors, loras_of
from lit_edm.sdxl.injection import weights_of


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


def lora_of(module: SDXLModule) -> dict[str, Tensor]:
    return diffusers_tensors(loras_of(weights_of({"unet": module.denoiser.unet})))


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
        saved, live = load_file(path / "pytorch_lora_weights.safetensors"), lora_of(module)
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


def test_writes_the_formats_and_the_precision_asked_for(tiny: Path, icons: Path, tmp_path: Path) -> None:
    fit(tiny, icons, tmp_path, SaveAdapter("x", formats=["kohya", "bundled"], precision="bf16"), tokens={"TOK": 1})
    files = {path.name: path for path in (tmp_path / "adapter").glob("*.safetensors")}
    assert files.keys() == {"x.safetensors", "x_bundled.safetensors", "x_emb.safetensors"}
    assert load_file(files["x_emb.safetensors"])["clip_g"].dtype == torch.bfloat16
    bundle, rows = load_file(files["x_bundled.safetensors"]), load_file(files["x_emb.safetensors"])
    assert all(bundle[f"bundle_emb.TOK.{name}"].equal(value) for name, value in rows.items())
    assert bundle.keys() - load_file(files["x.safetensors"]).keys() == {f"bundle_emb.TOK.{name}" for name in rows}
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert all(name in card for name in files)


def test_ends_by_saying_where_the_files_are_and_how_to_use_them(
    tiny: Path, icons: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fit(tiny, icons, tmp_path, SaveAdapter("icons"), tokens={"TOK": 1})
    said = caplog.messages[-1]
    for name in ("pytorch_lora_weights.safetensors", "icons_emb.safetensors", "README.md"):
        assert str(tmp_path / "adapter" / name) in said
    assert "pipe.load_lora_weights(" in said


def test_checkpoints_of_validation_are_exported_too(tiny: Path, icons: Path, tmp_path: Path, trainer: Any) -> None:
    (tmp_path / "held_out").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "held_out" / "a.png")
    data = CaptionedImagesDataModule(
        icons, resolution=16, batch_size=4, val_root=tmp_path / "held_out", instance_prompt="TOK"
    )
    (tmp_path / "held_out" / "a.txt").write_text("TOK")
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss", save_top_k=-1)
    run = trainer(
        ValidationLoss([1.0]), SaveAdapter("x"), best, max_steps=4, val_check_interval=2, enable_checkpointing=True
    )
    run.fit(SDXLModule(str(tiny), tokens={"TOK": 1}, adapter=LoRA(rank=2)), data)
    assert len(list((tmp_path / "best").iterdir())) == 2
    written = {path.name for path in (tmp_path / "adapter").glob("step_*")}
    assert written == {"step_000002", "step_000004"}


def test_a_run_of_other_settings_leaves_nothing_behind(tiny: Path, icons: Path, tmp_path: Path, trainer: Any) -> None:
    def run(adapter: Adapter, tokens: dict[str, int] | None) -> set[str]:
        data = CaptionedImagesDataModule(icons, resolution=16, batch_size=4)
        trainer(SaveAdapter("x"), max_steps=1).fit(SDXLModule(str(tiny), tokens=tokens, adapter=adapter), data)
        return {path.name for path in (tmp_path / "adapter").iterdir()}

    assert run(LoRA(rank=2), {"TOK": 1}) == {"README.md", "pytorch_lora_weights.safetensors", "x_emb.safetensors"}
    (tmp_path / "adapter" / "mine.txt").write_text("a user's own")
    assert run(FullFinetune(("mid_block",)), None) == {"README.md", "unet", "mine.txt"}
    assert run(LoHa(rank=2), None) == {"README.md", "x_lycoris.safetensors", "mine.txt"}


def test_a_full_disk_costs_the_export_and_not_the_checkpoint(
    tiny: Path, icons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("lit_edm.files.save_file", full)
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1)
    said = (
        r"lora_weights.safetensors could not be written: No space left on device, with .* free on its disk; make room"
    )
    with (
        pytest.warns(UserWarning, match=f"SaveAdapter leaves out step 2, and the run goes on: .*{said}"),
        pytest.raises(InputError, match=rf"{said}.*scripts/export.py makes these files"),
    ):
        fit(tiny, icons, tmp_path, SaveAdapter(), keep)
    assert len(list((tmp_path / "kept").glob("*.ckpt"))) == 2
    assert not list(tmp_path.rglob("*.part"))
