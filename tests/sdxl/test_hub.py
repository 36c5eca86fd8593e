import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_edm.errors import InputError
from lit_edm.sdxl.hub import CHECKPOINTS, HubRepository, first_sentence, is_hub_name


@pytest.mark.parametrize("name", ["", "a b", "a/b/c", "-a", "a..b", "x" * 97, "https://huggingface.co/a/b", "a.git"])
def test_names_that_the_hub_refuses(name: str) -> None:
    with pytest.raises(
        InputError, match=r"^SaveAdapter\.push_to_hub is '.*', which no repository can be called; write owner/name"
    ):
        HubRepository(name)


@pytest.mark.parametrize(
    ("name", "full"), [("icons", "someone/icons"), ("someone/icons", "someone/icons"), ("club/icons", "club/icons")]
)
def test_the_owner_is_the_user_or_a_club_of_theirs(hub: Any, name: str, full: str) -> None:
    assert HubRepository(name).full_name() == full


def test_a_stranger_cannot_be_the_owner(hub: Any) -> None:
    with pytest.raises(InputError, match=r"is other/icons, but you are someone; write someone/icons$"):
        HubRepository("other/icons").full_name()


def test_says_that_nobody_is_logged_in() -> None:
    """By the Hub's own client, which is told to stay offline in all tests."""
    with pytest.raises(InputError, match=r"does not know you \(.+\): run `hf auth login`, set HF_TOKEN, or") as error:
        HubRepository("someone/icons").full_name()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("private", [True, False])
def test_sends_a_folder_without_its_checkpoints(hub: Any, tmp_path: Path, private: bool) -> None:
    sent = {"README.md", "step_by_step_emb.safetensors", "unet/config.json"}
    for name in sent | {"step_000002/README.md", "step_1000000/unet/config.json"}:
        (tmp_path / "adapter" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "adapter" / name).write_text(name)
    address = HubRepository("someone/icons", private).upload(tmp_path / "adapter")
    assert address == "https://hub.test/someone/icons"
    assert hub.made == {"someone/icons": {"private": private, "exist_ok": True}}
    there = hub.folder("someone/icons")
    assert {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()} == sent


def test_the_command_by_hand_is_one_of_the_hubs_program(tmp_path: Path) -> None:
    """Which understands it, and only then finds that it is to stay offline."""
    folder = tmp_path / "it's mine"
    folder.mkdir()
    (folder / "README.md").write_text("# Mine\n")
    program, *words = shlex.split(HubRepository("someone/icons").upload_command(folder))
    assert words == ["upload", "someone/icons", str(folder), ".", "--exclude", CHECKPOINTS, "--private"]
    command = [str(Path(sys.executable).with_name(program)), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "offline mode is enabled" in ended.stderr
    assert "--private" not in HubRepository("someone/icons", private=False).upload_command(folder)


def test_bases_on_the_hub_and_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_hub_name("stabilityai/stable-diffusion-xl-base-1.0")
    assert not any(is_hub_name(name) for name in (str(tmp_path), "gpt2", "a/b/c", "../x/y"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build/tiny").mkdir(parents=True)
    assert not is_hub_name("build/tiny")


def test_errors_in_one_sentence() -> None:
    assert first_sentence(OSError("  no\nmore. Much 1.5 more.\n")) == "no more"
    assert first_sentence(OSError("v1.5 is dead.")) == "v1.5 is dead"
    assert first_sentence(KeyError()) == "KeyError"
