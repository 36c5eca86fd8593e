import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_edm.callbacks.disk_room import Files, check_room, standing
from lit_edm.errors import InputError


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every disk 1,000 bytes left."""
    monkeypatch.setattr("lit_edm.callbacks.disk_room.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))


@pytest.mark.usefixtures("free")
def test_folders_of_a_disk_share_its_room(tmp_path: Path) -> None:
    planned = [
        Files("latents", tmp_path / "a/b", 300),
        Files("checkpoints", tmp_path / "c", 600),
        Files("texts", None, 9999),
    ]
    (room,) = check_room(planned)
    assert (room.folder, room.needed, room.free) == (tmp_path / "c", 900, 1000)
    with pytest.raises(
        InputError, match=r"c: this run needs about 1.1 KiB .* for checkpoints, .* 1.0 KiB are free: free"
    ):
        check_room([*planned, Files("pictures", tmp_path, 200)])


@pytest.mark.usefixtures("free")
def test_what_is_replaced_has_its_room_already(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/last.ckpt").write_bytes(bytes(700))
    (room,) = check_room([Files("checkpoints", tmp_path, 1500, replaces=True)])
    assert room.needed == 800
    (room,) = check_room([Files(which, tmp_path, 750, replaces=True) for which in ("checkpoints", "others")])
    assert room.needed == 800, "what is there makes room once"
    with pytest.raises(InputError, match="most of it for latents"):
        check_room([Files("latents", tmp_path, 1500)])
    (room,) = check_room([Files("checkpoints", tmp_path, 500, replaces=True)])
    assert room.needed == 0


def test_disks_are_told_apart(tmp_path: Path) -> None:
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    rooms = check_room([Files("latents", tmp_path / "a", 1), Files("pictures", shared_memory / "a", 2)])
    assert [room.needed for room in rooms] == [1, 2]


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(InputError, match=r"runs is a file, where this run is to have a folder, .*/runs/a/b: move it"):
        check_room([Files("checkpoints", tmp_path / "runs/a/b", 1)])


def test_a_folder_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match=r"cannot be written to, where this run is to have .*/a: name another folder"):
        standing(tmp_path / "a")


def test_nothing_is_asked_of_a_folder_that_nothing_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that holds everything may be one that others share."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert check_room([Files("latents", tmp_path / "a", 0)]) == []
