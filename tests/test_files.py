from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lit_edm.files import read_tensors, readable, write_tensors, write_whole


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.txt"
    assert write_whole(path, lambda part: part.write_text("first")) == path

    def fail(part: Path) -> None:
        part.write_text("half of the sec")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_others_may_read_what_they_may_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)})
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_what_was_written_is_moved_and_not_copied(tmp_path: Path) -> None:
    """A copy would be half there for a while."""
    written: list[int] = []

    def write(part: Path) -> None:
        part.write_text("text")
        written.append(part.stat().st_ino)

    assert write_whole(tmp_path / "file.txt", write).stat().st_ino == written[0]


def test_the_contents_are_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "file.txt", []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(path.exists()))
    write_whole(path, lambda part: part.write_text("text"))
    assert synced == [False]
    assert path.read_text() == "text"


def test_tensors_come_back_in_their_own_precision(tmp_path: Path) -> None:
    tensors = {"half": torch.randn(3, 4, dtype=torch.bfloat16).T, "whole": torch.randn(2, requires_grad=True)}
    path = write_tensors(tmp_path / "a.safetensors", tensors, {"software": "mine"})
    read = read_tensors(path)
    assert read is not None
    assert all(read[name].equal(tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "software": "mine"}


def test_a_missing_or_damaged_file_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    assert read_tensors(path) is None
    write_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:-1])
    assert read_tensors(path) is None


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (300_000, "293 KiB"),
        (1023 * 1024, "1.0 MiB"),
        (7 * 2**30, "7.0 GiB"),
        (4096 * 2**30, "4,096.0 GiB"),
    ],
)
def test_sizes_in_words(size: int, words: str) -> None:
    assert readable(size) == words
