"""What README and model cards tell people to type: the code runs, the commands are understood."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from lit_edm.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))]
CONFIG = "configs/sdxl_pivotal.yaml"


def commands(text: str) -> list[list[str]]:
    """Splits lines of a shell into words, without comments and settings of the environment."""
    lines = text.replace("\\\n", " ").splitlines()
    split = [[word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)] for line in lines]
    return [words for words in split if words]


def command_lines() -> list[list[str]]:
    """All of README's commands: in blocks, in the text, and settings in the text as they are given to a config."""
    found = [words for language, text in BLOCKS if language == "bash" for words in commands(text)]
    for span in SPANS:
        if re.match(r"(lit-edm|make|pip|python scripts/\S+) \S", span) or re.fullmatch(r"python scripts/\S+", span):
            found += commands(span)
        elif re.match(r"--[\w.]+[ =]\S", span):
            found += commands(f"lit-edm fit --config {CONFIG} {span}")
    return [[CONFIG if word == "..." else word for word in words] for words in found]


def check_lit_edm(*words: str) -> None:
    """Understands all it is told, in a config that it would then run."""
    describes = any(word.endswith(("help", "print_config")) for word in words)
    with pytest.raises(SystemExit) as ended:
        main([*words, *([] if describes else ["--print_config"])])
    assert ended.value.code in (0, None)


def check_make(*words: str) -> None:
    """Has the targets."""
    targets = re.findall(r"^([\w/-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets)


def check_pip(*words: str) -> None:
    """Installs this package, with extras that there are."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    assert {name for word in words for part in re.findall(r"\[(.*)\]", word) for name in part.split(",")} <= set(extras)


def check_python(script: str, *words: str) -> None:
    """Finds the script, which knows the options."""
    assert (ROOT / script).is_file()
    if words:
        command = [sys.executable, script, "--help"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", ended.stdout), f"{script} has no {option}"


CHECKS = {"lit-edm": check_lit_edm, "make": check_make, "pip": check_pip, "python": check_python}


def test_the_python_runs() -> None:
    blocks = [text for language, text in BLOCKS if language == "python"]
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    assert names["loss"].shape == ()
    assert names["loss"].item() > 0
    assert names["drawn"].shape == (4, 2)
    assert torch.isfinite(names["drawn"]).all()


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_commands_are_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    CHECKS[words[0]](*words[1:])


def test_commands_are_found_and_mistakes_in_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert {"lit-edm", "make", "pip", "python"} == {words[0] for words in command_lines()}
    assert commands("A=1 lit-edm fit \\\n  --x 1  # why\n\n") == [["lit-edm", "fit", "--x", "1"]]
    with pytest.raises(AssertionError):
        check_lit_edm("fit", "--config", CONFIG, "--model.no_such_key", "1")
    with pytest.raises(AssertionError):
        check_make("no-such-target")
    with pytest.raises(AssertionError):
        check_pip("install", ".[no-such-extra]")
    with pytest.raises(AssertionError):
        check_python("scripts/make_tiny_sdxl.py", "--no_such_option")


FILES = re.findall(r"(?:configs|scripts|docs|lit_edm|data|benchmarks)/[\w./-]*\w", README)


@pytest.mark.parametrize("path", sorted(set(FILES)))
def test_files_it_names_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_command_of_a_card_repeats_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, by the files beside the card alone."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=2", "--data.repeats=1"]
    callbacks = "--trainer.callbacks=[{class_path: SaveAdapter, init_args: {name: icons3d}}]"
    main(["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *short, callbacks])
    shutil.move("runs/quickstart", "first")
    shutil.copy("first/adapter/config.yaml", "config.yaml")
    card = ModelCard.load(tmp_path / "first/adapter/README.md").text
    assert card.split("```yaml\n")[1].split("```")[0] == Path("config.yaml").read_text()
    (command,) = commands(card.split("```bash\n")[1].split("```")[0])
    assert command[0] == "lit-edm"
    main(command[1:])
    assert Path("runs/quickstart/config.yaml").read_text() == Path("config.yaml").read_text()
    for name in ("pytorch_lora_weights.safetensors", "icons3d_emb.safetensors"):
        first, again = (load_file(Path(run, "adapter", name)) for run in ("first", "runs/quickstart"))
        assert first.keys() == again.keys()
        assert all(first[key].equal(again[key]) for key in first)
