"""Every setting that docs/diffusers_flags.md names exists and takes the value that stands there."""

import importlib.util
import json
import runpy
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_edm.cli import main

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "scripts/flags_table.py"))
FLAGS = [flag for rows in SCRIPT["read_facts"]().values() for flag in rows]

Settings = dict[str, Any]


def merged(settings: Iterable[Settings]) -> list[Settings]:
    """Puts together what does not contradict each other: fewer configs to parse."""
    together: list[Settings] = []
    for one in settings:
        fitting = next((some for some in together if all(some.get(k, v) == v for k, v in one.items())), None)
        if fitting is None:
            together.append(dict(one))
        else:
            fitting.update(one)
    return together


def arguments(settings: Settings) -> list[str]:
    """Writes settings as arguments of the command line: a class before its arguments, a callback as a new item."""
    written = []
    for owner, pairs in groupby(sorted(settings.items()), lambda pair: pair[0].partition(".")[0]):
        is_callback = owner[0].isupper()
        written += [f"--trainer.callbacks+={owner}"] if is_callback else []
        for key, value in pairs:
            path = f"trainer.callbacks{key.removeprefix(owner)}" if is_callback else key
            written.append(f"--{path}={value if isinstance(value, str) else json.dumps(value)}")
    return written


def held(config: Settings, key: str) -> Any:
    """Returns what a dumped config holds under a key: a value, or the last part of a class's path."""
    first, *path = key.split(".")
    if first[0].isupper():
        node = [item for item in config["trainer"]["callbacks"] if item["class_path"].endswith(f".{first}")][-1]
    else:
        node = config[first]
    for part in path:
        node = node.get("init_args", node)[part]
    return node["class_path"].rpartition(".")[2] if isinstance(node, dict) and "class_path" in node else node


def parse(settings: Settings, capsys: pytest.CaptureFixture[str]) -> Settings:
    """Returns the config that settings make of configs/sdxl_pivotal.yaml."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(ROOT / "configs/sdxl_pivotal.yaml"), *arguments(settings), "--print_config"])
    printed = capsys.readouterr()
    assert ended.value.code in (0, None), printed.err
    return yaml.safe_load(printed.out)


def test_every_flag_is_there_once() -> None:
    assert [sum(script in flag["default"] for flag in FLAGS) for script in ("advanced", "dreambooth")] == [81, 72]
    assert len({flag["flag"] for flag in FLAGS}) == len(FLAGS)


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag["flag"])
def test_every_flag_has_a_setting_or_advice(flag: dict[str, Any]) -> None:
    assert flag.keys() <= {"flag", "default", "does", "ours", "note", "needs"}
    assert flag.get("ours") or flag.get("note")


@pytest.mark.parametrize("settings", merged(flag["ours"] for flag in FLAGS if "ours" in flag and "needs" not in flag))
def test_settings_parse(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(settings, capsys)
    assert {key: held(config, key) for key in settings} == settings


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if "needs" in flag], ids=lambda flag: flag["flag"])
def test_settings_of_other_packages_parse(flag: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec(flag["needs"]) is None:
        pytest.skip(f"{flag['needs']} is not installed")
    config = parse(flag["ours"], capsys)
    assert all(value.endswith(f".{held(config, key)}") for key, value in flag["ours"].items())


def test_the_page_says_what_the_facts_say() -> None:
    written = (ROOT / "docs/diffusers_flags.md").read_text(encoding="utf-8")
    assert written == SCRIPT["page"](SCRIPT["read_facts"]()), "run scripts/flags_table.py"
