"""Every config parses, describes each key, and those that need no download run for real."""

import csv
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_edm.cli import main
from lit_edm.modules import SDXLModule
from lit_edm.sdxl import SDXLCheckpoint
from lit_edm.sdxl.checks import check_loss
from lit_edm.sdxl.formats import write_diffusers, write_embeddings
from lit_edm.sdxl.injection import weights_of

ROOT = Path(__file__).parents[1]
EDM_NATIVE = ("playground", "quickstart", "text_to_image")
"""Configs of bases with EDM's own preconditioning."""
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def command_of(config: Path) -> str:
    return "predict" if config.stem.startswith("generate") else "fit"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_config_parses_and_loads_back(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def dumped(path: Path) -> str:
        with pytest.raises(SystemExit) as ended:
            main([command_of(config), "--config", str(path), "--print_config"])
        assert ended.value.code in (0, None), capsys.readouterr().err
        return capsys.readouterr().out

    once = dumped(config)
    again = tmp_path / "again.yaml"
    again.write_text(once)
    assert dumped(again) == once
    assert yaml.safe_load(once)["model"]["class_path"].startswith("lit_edm.modules.")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_key_has_a_comment(config: Path) -> None:
    """On its line, or on the line of what it belongs to."""
    lines = config.read_text().splitlines()
    assert lines[0].startswith("# ")
    for number, line in enumerate(lines):
        if not (match := re.match(r"^(\s*)(- )?(\w+):(?! *$)", line)) or "#" in line:
            continue
        key, indent = match[3], len(match[1] + (match[2] or ""))
        if key in ("class_path", "save_dir", "name", "dirpath") or line.lstrip().startswith("init_args: {save_dir"):
            continue
        above = [line for line in lines[:number] if len(line) - len(line.lstrip()) < indent]
        assert "#" in above[-1], f"{config.name}:{number + 1}: {key} has no comment"


def test_losses_fit_their_bases(tiny: Path, tiny_edm: Path) -> None:
    """The combination of base and loss of each config, on a base of the same kind."""
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningCLI

    for config in CONFIGS:
        if command_of(config) == "predict":
            continue
        base = SDXLCheckpoint(str(tiny_edm if config.stem in EDM_NATIVE else tiny))
        cli = LightningCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            run=False,
            save_config_callback=None,
            args=["--config", str(config), "--trainer.logger=false", "--trainer.precision=32-true"],
        )
        if isinstance(cli.model, SDXLModule):
            check_loss(cli.model.loss, base.preconditioning(), base.sigma_range())


def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole run, but for its length: fit, losses, pictures, logs, checkpoints, files."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=5", "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=5"]
    main(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *short])
    run = tmp_path / "runs/quickstart"
    written = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert written >= {
        "config.yaml",
        "metrics.csv",
        "checkpoints/last.ckpt",
        "images/before_after.png",
        "images/step_000005/03.png",
        "adapter/README.md",
        "adapter/pytorch_lora_weights.safetensors",
        "adapter/icons3d_emb.safetensors",
        "adapter/sample_03.png",
        "adapter/config.yaml",
    }
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert len([row for row in rows if row["train/loss"]]) == 5
    (validated,) = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert 0.1 < validated < 1  # of a base that knows what icons look like


RECIPES = {
    "sdxl_pivotal": "tiny",
    "sdxl_edm": "tiny",
    "playground": "tiny_edm",
    "sdxl_dreambooth": "tiny",
    "sdxl_advanced": "tiny",
    "text_to_image": "tiny_edm",
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    """Each as it is written, but for a tiny base, tiny images and few steps."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    base = request.getfixturevalue(RECIPES[name])
    small = [f"--model.pretrained={base}", "--model.vae=null", "--model.variant=null", "--data.resolution=16"]
    short = [
        "--trainer.max_steps=4",
        "--trainer.log_every_n_steps=1",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
    ]
    if name == "sdxl_dreambooth":
        short += ["--data.instance_prompt=an icon", "--data.prior.num_images=3", "--data.buckets.step=8"]
    if name == "sdxl_advanced":
        short += ["--data.buckets.step=8"]
    for callback in config["trainer"]["callbacks"]:
        if callback["class_path"] == "ValidationImages":
            callback["init_args"] |= {
                "resolution": 16,
                "sampler": {"class_path": "EulerSampler", "init_args": {"num_steps": 2}},
            }
        elif callback["class_path"] == "TrainDuring" and callback["init_args"]["group"] == "unet":
            callback["init_args"]["start"] = 0.25
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config=small.yaml", *small, *short])
    run = tmp_path / "runs" / name
    losses = [float(row["train/loss"]) for row in csv.DictReader((run / "metrics.csv").open()) if row["train/loss"]]
    assert len(losses) == 4
    assert all(map(math.isfinite, losses))
    written = (
        "unet/diffusion_pytorch_model.safetensors" if name == "text_to_image" else "pytorch_lora_weights.safetensors"
    )
    assert (run / "adapter" / written).is_file()
    assert (run / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(("name", "base"), [("generate", "tiny"), ("generate_playground", "tiny_edm")])
def test_prompts_are_rendered(
    name: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """As they are written, but for a tiny base, an adapter of it, tiny pictures and few steps."""
    monkeypatch.chdir(tmp_path)
    folder = request.getfixturevalue(base)
    if name == "generate":
        module = SDXLModule(str(folder), tokens={"TOK": 2})
        module.configure_model()
        weights = weights_of(module.networks(), module.conditioner.new_embeddings())
        write_diffusers(weights, tmp_path / "runs/sdxl_pivotal/adapter/pytorch_lora_weights.safetensors")
        write_embeddings(weights, tmp_path / "runs/sdxl_pivotal/adapter/sdxl_pivotal_emb.safetensors")
    small = ["--model.vae=null", "--model.variant=null", "--data.height=16", "--data.width=16"]
    short = ["--model.generation.sampler.num_steps=3", "--trainer.accelerator=cpu"]
    main(["predict", f"--config={ROOT / 'configs' / name}.yaml", f"--model.pretrained={folder}", *small, *short])
    pictures = sorted(path.name for path in (tmp_path / "runs" / name / "pictures").iterdir())
    assert len(pictures) == (5 if name == "generate" else 3)
    assert pictures[-1] == "sheet_00.png"


def test_the_digits_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run from scratch in small: fit, average, validation, samples, logs, checkpoints."""
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--trainer.val_check_interval=1"]
    small = ["--model.network.channels=8", "--data.held_out=0.02"]
    main(["fit", "--config", str(ROOT / "configs/edm_digits.yaml"), *short, *small])
    run = tmp_path / "runs/edm_digits"
    written = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert written >= {"config.yaml", "checkpoints/last.ckpt", "samples/step_000000.png", "samples/step_000002.png"}
    columns = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "val/loss", "val/loss_sigma_0.002", "val/loss_sigma_80", "val/frechet_distance"} <= {*columns}
    average = torch.load(run / "checkpoints/last.ckpt")["callbacks"]["ExponentialMovingAverage"]
    assert average["images_seen"] == 2 * 128
