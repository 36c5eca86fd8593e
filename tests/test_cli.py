"""What the user sees: one line for each mistake, before anything slow."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_edm.callbacks import Pace
from lit_edm.cli import CLI, Parser, main
from lit_edm.loggers import read_rows
from lit_edm.usage import HELP


@pytest.fixture
def run(tiny: Path, icons: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `lit-edm fit` on a small working config with changes, and returns the one line it must end with."""
    folder = tmp_path / "icons"
    shutil.copytree(icons, folder)
    config = {
        "model": {
            "class_path": "SDXLModule",
            "init_args": {
                "pretrained": str(tiny),
                "tokens": {"TOK": 1},
                "loss": {"class_path": "EDMLoss", "init_args": {"noise": {"class_path": "UniformTimesteps"}}},
            },
        },
        "data": {"class_path": "CaptionedImagesDataModule", "init_args": {"root": str(folder), "resolution": 16}},
        "trainer": {
            "max_steps": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
        },
    }
    config["model"]["init_args"]["loss"]["init_args"]["weighting"] = {"class_path": "SNRWeighting"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))

    def fails(*changes: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", str(path), *changes])
        assert ended.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("lit-edm: error: ")
        return last.removeprefix("lit-edm: error: ")

    main(["fit", "--config", str(path)])  # it works before it is broken
    capsys.readouterr()
    return fails


def test_missing_folder(run: Callable[..., str], tmp_path: Path) -> None:
    said = run(f"--data.root={tmp_path / 'nowhere'}")
    assert str(tmp_path / "nowhere") in said
    assert "data.init_args.root" in said


def test_empty_folder(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    said = run(f"--data.root={tmp_path / 'empty'}")
    assert str(tmp_path / "empty") in said


def test_row_without_its_image(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "icons" / "07-house.webp").unlink()
    said = run()
    assert "metadata.jsonl" in said
    assert "8" in said
    assert "07-house.webp" in said


def test_missing_caption_column(run: Callable[..., str]) -> None:
    said = run("--data.caption_column=text")
    assert "metadata.jsonl" in said
    assert "text" in said
    assert "prompt" in said, "the columns that are there"


def test_image_that_does_not_decode(run: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "icons" / "03-bicycle.webp"
    path.write_bytes(path.read_bytes()[:900])
    assert "03-bicycle.webp" in run()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--model=SDXLModul"], "model: no LightningModule is called SDXLModul; did you mean SDXLModule?"),
        (
            ["--model.loss.weighting=MinSNRWeightin"],
            "model.init_args.loss.init_args.weighting: no LossWeighting is called MinSNRWeightin; did you mean Min",
        ),
        (["--trainer.callbacks+=FreezeEmbedding"], "did you mean FreezeEmbeddings?"),
        (["--model.adapter.rankk=3"], "model.init_args.adapter: Option 'rankk' is not accepted"),
        (["--model.adapter.rank=x"], "model.init_args.adapter.init_args.rank: expected int, got x"),
        (["--model.adapter.rank=0"], "LoRA.rank must be 1 or more, got 0"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_unknown_names_and_values(run: Callable[..., str], changes: list[str], said: str) -> None:
    assert said in run(*changes)


def test_placeholder_in_no_caption(run: Callable[..., str]) -> None:
    assert "model.init_args.tokens: no caption holds the word HAT" in run('--model.tokens={"HAT": 1}')


def test_ti_frac_outside_its_range(run: Callable[..., str]) -> None:
    said = run("--trainer.callbacks+=FreezeEmbeddings", "--trainer.callbacks.ti_frac=1.5")
    assert "FreezeEmbeddings.ti_frac is 1.5" in said


def test_resolution_that_does_not_divide(run: Callable[..., str]) -> None:
    assert "images of 17 px a side would be trained on, which is not a multiple of 2" in run("--data.resolution=17")


def test_parts_check_their_settings(run: Callable[..., str]) -> None:
    said = run("--model.loss.weighting=MinSNRWeighting", "--model.loss.weighting.gamma=-1")
    assert "MinSNRWeighting.gamma must be positive" in said


def test_nothing_to_resume(run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--ckpt_path last: there is no whole checkpoint in a fixed folder" in run("--ckpt_path=last")
    folder = tmp_path / "checkpoints"
    keep = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(folder), "save_last": True}}
    settings = ["--trainer.enable_checkpointing=true", f"--trainer.callbacks=[{json.dumps(keep)}]"]
    assert f"there is no whole checkpoint in {folder};" in run("--ckpt_path=last", *settings)
    assert f"{tmp_path / 'none.ckpt'}: there is no such checkpoint" in run(f"--ckpt_path={tmp_path / 'none.ckpt'}")
    main(["fit", "--config", str(tmp_path / "config.yaml"), *settings])

    def as_path(self: CLI) -> None:  # which jsonargparse does at times, where text or a path will do
        if self.config.fit.ckpt_path:
            self.config.fit.ckpt_path = Path(self.config.fit.ckpt_path)

    monkeypatch.setattr(CLI, "before_instantiate_classes", as_path)
    main(["fit", "--config", str(tmp_path / "config.yaml"), *settings, "--ckpt_path=last", "--trainer.max_steps=2"])
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr("lit_edm.sdxl.checkpoint.SDXLCheckpoint.load_unet", None)  # nothing slow comes before
    with pytest.warns(UserWarning, match="is passed over"):
        assert "--ckpt_path last: there is no whole checkpoint" in run("--ckpt_path=last", *settings)
    said = run(f"--ckpt_path={folder / 'last.ckpt'}", *settings)
    assert said.startswith(f"--ckpt_path {folder / 'last.ckpt'} is damaged, or no checkpoint; name another")


def test_checkpoints_are_whole_unless_the_config_says_otherwise(
    run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    monkeypatch.setattr(CLI, "after_fit", lambda self: used.append(self.trainer.strategy.checkpoint_io), raising=False)
    for plugins in ("null", "[{class_path: WholeCheckpointIO}]", "AsyncCheckpointIO"):
        main(["fit", "--config", str(tmp_path / "config.yaml"), f"--trainer.plugins={plugins}"])
    assert [type(io).__name__ for io in used] == ["WholeCheckpointIO", "WholeCheckpointIO", "AsyncCheckpointIO"]


def test_every_run_tells_its_pace(run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever callbacks its config has."""
    kept: list[Trainer] = []
    monkeypatch.setattr(CLI, "after_fit", lambda cli: kept.append(cli.trainer), raising=False)
    for callbacks in ("null", "[]", "[{class_path: SkipNonFinite}]"):
        main(["fit", "--config", str(tmp_path / "config.yaml"), f"--trainer.callbacks={callbacks}"])
    assert [[type(callback) for callback in trainer.callbacks].count(Pace) for trainer in kept] == [1, 1, 1]


KILLED = """
import os, signal
from lit_edm.cli import main
from lit_edm.modules import SDXLModule

def kill(self, *_):
    if self.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)

SDXLModule.on_train_batch_end = kill
main()
"""


def test_a_killed_run_logs_what_one_that_never_stopped_does(run: Callable[..., str], tmp_path: Path) -> None:
    """Of a run that is gone right after a checkpoint, before Lightning logs its step."""
    (tmp_path / "killed.py").write_text(KILLED)
    logs = []
    for name in ("whole", "killed"):
        folder = str(tmp_path / name)
        logger = {"class_path": "ResumableCSVLogger", "init_args": {"save_dir": folder, "name": "", "version": ""}}
        keep = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": folder, "every_n_train_steps": 3}}
        settings = ["--trainer.max_steps=8", "--trainer.log_every_n_steps=1", f"--trainer.logger={json.dumps(logger)}"]
        settings += ["--trainer.enable_checkpointing=true", f"--trainer.callbacks=[{json.dumps(keep)}]"]
        arguments = ["fit", "--config", str(tmp_path / "config.yaml"), *settings]
        if name == "killed":
            command = [sys.executable, "killed.py", *arguments]
            ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert ended.returncode == -9, ended.stderr
            arguments.append("--ckpt_path=last")
        main(arguments)
        rows = read_rows(tmp_path / name / "metrics.csv")
        assert all({"pace/seconds_per_step", "pace/images_per_second", "pace/seconds_left"} <= {*row} for row in rows)
        logs.append([{key: cell for key, cell in row.items() if not key.startswith("pace/")} for row in rows])
    assert logs[0] == logs[1]
    assert len(logs[0]) == 8


def test_a_message_of_several_lines_is_one(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "icons" / "01-rocket.webp", tmp_path / "two")
    (tmp_path / "two" / "01-rocket.txt").write_text("first line\nsecond line")
    said = run(f"--data.root={tmp_path / 'two'}")
    assert said.startswith("model.init_args.tokens: no caption holds the word TOK")
    assert said.endswith("'first line second line'")


def test_wrong_base_for_the_loss(run: Callable[..., str], tiny_edm: Path) -> None:
    assert "noise is UniformTimesteps, but the base is EDM-native" in run(f"--model.pretrained={tiny_edm}")


def test_missing_base(run: Callable[..., str]) -> None:
    assert "model.init_args.pretrained: cannot read" in run("--model.pretrained=nobody/nothing")


def test_yaml_that_is_none(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model:\n  class_path: X\n init_args: 3\n")
    assert "line 3" in run(f"--config={tmp_path / 'bad.yaml'}")


def test_an_error_of_ours_keeps_its_traceback(run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("lit_edm.modules.SDXLModule.training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        run()


def test_what_lightning_refuses_is_one_line(run: Callable[..., str]) -> None:
    assert run("--trainer.max_steps=-5").startswith("trainer: `max_steps` must be a non-negative integer or -1")
    assert run("--trainer.strategy=ddpp").startswith("trainer: You selected an invalid strategy name")
    keeper = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-5"]
    assert "save_top_k=-5" in run(*keeper)
    assert "val_check_interval" in run("--trainer.val_check_interval=1000")


def test_what_lightning_refuses_of_ours_keeps_its_traceback(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def misuse(module: LightningModule, *_: object) -> None:
        module.log("a/dataloader_idx_0", 1.0)

    monkeypatch.setattr("lit_edm.modules.SDXLModule.log_loss", misuse)
    with pytest.raises(MisconfigurationException, match="should not contain information about `dataloader_idx`"):
        run()


def test_runs_that_could_not_train_or_write(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert run("--trainer.accumulate_grad_batches=0") == "trainer.accumulate_grad_batches is 0; give 1 or more"
    assert f"{tmp_path / 'file'} is a file, " in run(f"--trainer.default_root_dir={tmp_path / 'file'}")
    logger = ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'file/logs'}"]
    assert f"{tmp_path / 'file'} is a file, " in run(*logger)


def test_a_resumed_run_is_what_its_config_says(run: Callable[..., str], tmp_path: Path) -> None:
    """Lightning would take the rank and all else from the checkpoint, without a word."""
    config = ["fit", "--config", str(tmp_path / "config.yaml")]
    saving = ["--trainer.enable_checkpointing=true", "--trainer.callbacks+=ModelCheckpoint"]
    main([*config, *saving, f"--trainer.callbacks.dirpath={tmp_path}", "--trainer.callbacks.filename=first"])
    resumed = [*config, f"--ckpt_path={tmp_path / 'first.ckpt'}", "--trainer.max_steps=2"]
    main([*resumed, "--model.gradient_checkpointing=true", f"--trainer.default_root_dir={tmp_path / 'resumed'}"])
    saved = yaml.safe_load((tmp_path / "resumed" / "config.yaml").read_text())
    assert saved["model"]["init_args"]["gradient_checkpointing"] is True
    assert "trained with another adapter or other tokens" in run(*resumed[3:], "--model.tokens=null")


OTHER_PROJECT = '''
from dataclasses import dataclass
import torch
from torch import Tensor
from lit_edm.edm import NoiseDistribution

@dataclass(frozen=True)
class Middle(NoiseDistribution):
    """Always the same noise level."""
    sigma: float = 1.0
    drawn = []
    def __call__(self, batch_size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
        self.drawn.append(batch_size)
        return torch.full((batch_size,), self.sigma, device=device)
'''

BARE = """
import sys
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
import lit_edm.callbacks, lit_edm.data, lit_edm.modules
import other_project
cli = LightningCLI(LightningModule, LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
                   auto_configure_optimizers=False, save_config_callback=None)
print("losses", float(cli.trainer.callback_metrics["train/loss"]), other_project.Middle.drawn)
"""


def test_another_projects_noise_under_a_bare_cli(tiny: Path, icons: Path, tmp_path: Path) -> None:
    """A class of somebody else's by class_path, with the same YAML under lit-edm and under a plain LightningCLI."""
    (tmp_path / "other_project.py").write_text(OTHER_PROJECT)
    (tmp_path / "bare.py").write_text(BARE)
    config = {
        "seed_everything": 1,
        "model": {
            "class_path": "SDXLModule",
            "init_args": {
                "pretrained": str(tiny),
                "loss": {
                    "class_path": "EDMLoss",
                    "init_args": {
                        "noise": {"class_path": "other_project.Middle", "init_args": {"sigma": 2.0}},
                        "weighting": {"class_path": "EDMWeighting", "init_args": {"sigma_data": 1.0}},
                    },
                },
            },
        },
        "data": {"class_path": "CaptionedImagesDataModule", "init_args": {"root": str(icons), "resolution": 16}},
        "trainer": {"max_steps": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    outputs = []
    for program in (["bare.py"], ["-m", "lit_edm"]):
        command = [sys.executable, *program, "fit", "--config", "config.yaml", "--trainer.enable_progress_bar=false"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        outputs.append(ended.stdout + ended.stderr)
    assert "[1, 1, 1]" in outputs[0]
    assert "`max_steps=3` reached" in outputs[1]
    loss = float(outputs[0].split("losses ")[1].split()[0])
    assert torch.isfinite(torch.tensor(loss))


def test_help_needs_nothing_that_is_slow_to_import() -> None:
    """Not the time is tested, which depends on the machine, but what takes it."""
    code = "import sys; from lit_edm.__main__ import main; main(); print(*sys.modules, file=sys.stderr)"
    for option in ("-h", "--help"):
        command = [sys.executable, "-c", code, option]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert ended.stdout == HELP
        loaded = {name.partition(".")[0] for name in ended.stderr.split()}
        assert loaded - sys.stdlib_module_names <= {"__main__", "lit_edm"} | at_start(), "of no other package"


def at_start() -> set[str]:
    """What an installation may have every Python import before it begins."""
    command = [sys.executable, "-c", "import sys; print(*sys.modules)"]
    names = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    return {name.partition(".")[0] for name in names}


def test_help_is_that_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("-h", "--help"):
        with pytest.raises(SystemExit) as ended:
            main([option])
        assert ended.value.code in (0, None)
        assert capsys.readouterr().out == HELP
    subcommands, options = HELP.split("subcommands:")[1].split("options:")
    assert re.findall(r"^  (\w+)", subcommands, re.MULTILINE) == list(CLI.subcommands())
    cli = CLI.__new__(CLI)
    cli.parser_class = Parser
    parser = cli.init_parser()  # of the options before a subcommand
    listed = {option for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"(?<!\w)--?[a-z]\w*", options.split("\n\n")[0])) == listed


def test_the_command_line_imports_what_a_run_may_need_only_in_runs() -> None:
    """And collects garbage again, once it is imported."""
    code = (
        "import atexit, gc, sys; from lit_edm.__main__ import main;"
        "atexit.register(lambda: print(gc.isenabled(), *sys.modules)); main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr[:16]) == (2, "lit-edm: error: ")
    collects, *loaded = ended.stdout.split()
    assert collects == "True"
    late = {"diffusers", "peft", "datasets", "pyarrow", "pandas", "sklearn", "tensorboard", "accelerate", "prodigyopt"}
    assert "torch" in loaded
    assert not late & set(loaded)
