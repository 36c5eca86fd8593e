"""What version 0.1.0 has left is read and gone on from by every later one: see first_release/run.yaml."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_edm.cli import main
from lit_edm.modules.convert import convert

HERE = Path(__file__).parent / "first_release"


@pytest.fixture
def folder(tiny: Path, icons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the run was in, without what it wrote."""
    (tmp_path / "base").symlink_to(tiny)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "icons3d").symlink_to(icons)
    shutil.copyfile(HERE / "after_6.ckpt", tmp_path / "after_6.ckpt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_data_alone_and_small() -> None:
    assert zipfile.ZipFile(HERE / "after_6.ckpt").testzip() is None
    assert (HERE / "after_6.ckpt").stat().st_size < 500_000
    kept = torch.load(HERE / "after_6.ckpt", weights_only=True)
    assert kept["global_step"] == 6
    assert kept["callbacks"].keys() >= {"ExponentialMovingAverage", "SkipNonFinite"}


def test_it_is_exported_as_it_was(folder: Path) -> None:
    convert(folder / "after_6.ckpt", folder / "out")
    for written, expected in {
        "pytorch_lora_weights.safetensors": "after_6.safetensors",
        "out_emb.safetensors": "after_6_emb.safetensors",
    }.items():
        torch.testing.assert_close(load_file(folder / "out" / written), load_file(HERE / expected), rtol=0, atol=0)


def test_it_goes_on_as_it_did(folder: Path) -> None:
    """Past the pivot: the tokens stay what they are, and so does nearly their average."""
    main(["fit", "--config", str(HERE / "run.yaml"), "--ckpt_path", "after_6.ckpt"])
    end, before = (
        load_file(folder / "run/adapter/pytorch_lora_weights.safetensors"),
        load_file(HERE / "after_6.safetensors"),
    )
    torch.testing.assert_close(end, load_file(HERE / "after_8.safetensors"), rtol=1e-3, atol=1e-6)
    assert any(not value.equal(before[name]) for name, value in end.items())
    tokens = load_file(folder / "run/adapter/style_emb.safetensors")
    torch.testing.assert_close(tokens, load_file(HERE / "after_6_emb.safetensors"), rtol=1e-4, atol=1e-7)
