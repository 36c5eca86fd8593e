"""Scripts are thin; that they run is tested here, what they compute beside the source."""

import runpy
from pathlib import Path

import pytest
import yaml

from lit_edm.data import Digits

ROOT = Path(__file__).parents[1]


def test_sigma_data_of_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "scripts/sigma_data.py"))
    config = ["--config", str(ROOT / "configs/edm_digits.yaml"), "--trainer.logger=false", "--data.held_out=0"]
    script["main"](config)
    printed = yaml.safe_load(capsys.readouterr().out)
    expected = Digits().images.square().mean().sqrt().item()
    assert printed["sigma_data"] == pytest.approx(expected, abs=1e-4)


def test_sigma_data_of_latents(tiny_edm: Path, icons: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "scripts/sigma_data.py"))
    config = ["--config", str(ROOT / "configs/quickstart.yaml"), "--trainer.logger=false"]
    small = [f"--model.pretrained={tiny_edm}", f"--data.root={icons}", "--data.resolution=16", "--data.repeats=1"]
    script["main"](config + small)
    out = capsys.readouterr().out
    assert "# 22 images; of each channel mean" in out
    assert yaml.safe_load(out)["sigma_data"] > 0
