import errno
import io
import os
import pickle
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from lit_edm.checkpoints import WholeCheckpointIO, fault_of, find_last, size_of
from lit_edm.errors import InputError

WHOLE = {"state_dict": {"a": torch.arange(1000)}, "loops": {}, "optimizer_states": []}


def save(path: Path, contents: Any = WHOLE, age: float = 0) -> Path:
    """Writes a checkpoint some seconds ago."""
    WholeCheckpointIO().save_checkpoint(contents, path)
    os.utime(path, (time.time() - age,) * 2)
    return path


def in_another_process(work: Callable[[], object]) -> int:
    """Returns the exit code of a process that does some work and may be gone in the middle of it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Code:
    """Runs when a pickle is loaded."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


class TestWholeCheckpointIO:
    def test_comes_back(self, tmp_path: Path) -> None:
        path = save(tmp_path / "folder" / "last.ckpt")
        assert WholeCheckpointIO().load_checkpoint(path)["state_dict"]["a"].equal(torch.arange(1000))
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("moment", ["torch.save", "os.fsync"])
    def test_a_kill_leaves_the_one_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
        path = save(tmp_path / "last.ckpt")

        def killed(contents: Any, file: Any = None) -> None:
            if moment == "torch.save":
                file.write(b"half")
                file.flush()
            os._exit(9)

        monkeypatch.setattr(moment, killed)
        assert in_another_process(lambda: save(path, {"other": 1})) == 9
        monkeypatch.undo()
        assert fault_of(path) is None
        (part,) = set(tmp_path.iterdir()) - {path}
        save(path)
        assert part.exists(), "it may be that of a live process"
        os.utime(part, (time.time() - 3600,) * 2)
        save(path)
        assert list(tmp_path.iterdir()) == [path]

    def test_a_full_disk_leaves_the_one_before(self, tmp_path: Path) -> None:
        path = save(tmp_path / "last.ckpt")

        def fill() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
            with pytest.raises(InputError, match=r"last.ckpt could not be written: File too large.* takes 39\d KiB"):
                save(path, {"large": torch.zeros(100_000)})

        assert in_another_process(fill) == 0
        assert fault_of(path) is None
        assert list(tmp_path.iterdir()) == [path]

    def test_size_is_that_of_the_file(self, tmp_path: Path) -> None:
        assert abs(size_of(WHOLE) - save(tmp_path / "last.ckpt").stat().st_size) < 100

    def test_other_errors_stay_what_they_are(self, tmp_path: Path) -> None:
        with pytest.raises(AttributeError):
            WholeCheckpointIO().save_checkpoint({"local": lambda: 0}, tmp_path / "last.ckpt")
        assert list(tmp_path.iterdir()) == []

    def test_loads_no_code(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        torch.save({"state_dict": Code()}, "last.ckpt")
        with pytest.raises(pickle.UnpicklingError):
            WholeCheckpointIO().load_checkpoint("last.ckpt")
        assert not Path("ran").exists()

    def test_a_full_disk_ends_a_run_with_earlier_checkpoints_in_place(
        self,
        trainer: Callable[..., Trainer],
        pixels: Any,
        patches: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_last=True, save_on_exception=True)
        write, written = torch.save, []

        def full(contents: Any, file: Any) -> None:
            if not isinstance(file, io.BufferedWriter):
                write(contents, file)
            elif len(written) == 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            else:
                write(contents, file)
                written.append(file.name)

        monkeypatch.setattr(torch, "save", full)
        made = trainer(keep, enable_checkpointing=True, plugins=[WholeCheckpointIO()])
        with pytest.raises(InputError, match=r"step=3.ckpt could not be written: No space left on device"):
            made.fit(pixels(), patches())
        assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["epoch=0-step=2.ckpt", "last.ckpt"]
        assert all(fault_of(path) is None for path in (tmp_path / "kept").iterdir())


class TestFaultOf:
    def test_cut_off_anywhere(self, tmp_path: Path) -> None:
        path = save(tmp_path / "last.ckpt")
        contents = path.read_bytes()
        for length in (0, 1, 100, len(contents) // 2, len(contents) - 1):
            path.write_bytes(contents[:length])
            assert fault_of(path) == "is damaged, or no checkpoint"

    def test_a_bit_that_has_turned(self, tmp_path: Path) -> None:
        path = save(tmp_path / "last.ckpt")
        contents = bytearray(path.read_bytes())
        contents[len(contents) // 2] ^= 1
        path.write_bytes(contents)
        assert fault_of(path) == "is damaged"

    def test_other_files(self, tmp_path: Path) -> None:
        path = tmp_path / "x.ckpt"
        path.write_text("no checkpoint")
        assert fault_of(path) == "is damaged, or no checkpoint"
        save_file({"a": torch.zeros(1)}, path)
        assert fault_of(path) == "is damaged, or no checkpoint"
        torch.save([1], path)
        assert fault_of(path) == "is no checkpoint of a run"
        path.unlink()
        path.mkdir()
        assert fault_of(path) == "is a folder, and not a whole sharded checkpoint"

    def test_code(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        torch.save({**WHOLE, "more": Code()}, "x.ckpt")
        assert fault_of(Path("x.ckpt")) == "holds more than data, which could be code and is not loaded"
        assert not Path("ran").exists()
        Path("x.ckpt").write_bytes(pickle.dumps({**WHOLE, "more": Code()}))
        assert fault_of(Path("x.ckpt")) == "is damaged, or no checkpoint"
        assert not Path("ran").exists()

    def test_weights_alone(self, tmp_path: Path) -> None:
        path = save(tmp_path / "x.ckpt", {"state_dict": {}, "loops": {}})
        assert fault_of(path) == "holds weights alone, with which training cannot go on"
        assert fault_of(path, resumes=False) is None


class TestFindLast:
    @pytest.fixture
    def made(self, trainer: Callable[..., Trainer], tmp_path: Path) -> Trainer:
        keepers = [ModelCheckpoint(tmp_path / name, every_n_train_steps=n) for n, name in ((1, "one"), (2, "two"))]
        return trainer(*keepers, enable_checkpointing=True)

    def test_is_what_was_written_last(self, made: Trainer, tmp_path: Path) -> None:
        save(tmp_path / "one/epoch=9-step=900.ckpt", age=500)  # of an earlier run
        save(tmp_path / "one/last.ckpt", age=20)
        newest = save(tmp_path / "two/epoch=1-step=110.ckpt", age=10)  # and killed before last.ckpt
        shutil.copy(newest, tmp_path / ".epoch=1-step=111.ckpt.01234567.part")
        assert find_last(made) == newest

    def test_passes_over_what_is_damaged_and_says_so(self, made: Trainer, tmp_path: Path) -> None:
        whole = save(tmp_path / "one/epoch=1-step=100.ckpt", age=20)
        save(tmp_path / "one/weights.ckpt", {"state_dict": {}, "loops": {}}, age=10)
        (tmp_path / "one/last.ckpt").symlink_to("gone.ckpt")
        (tmp_path / "one/epoch=1-step=110.ckpt").write_bytes(whole.read_bytes()[:-100])
        with pytest.warns(UserWarning, match="is passed over") as warned:
            assert find_last(made) == whole
        assert ["step=110" in str(w.message) or "weights.ckpt" in str(w.message) for w in warned] == [True, True]

    def test_of_a_requeued_job(self, made: Trainer, tmp_path: Path) -> None:
        save(tmp_path / "one/last.ckpt", age=20)
        requeued = save(tmp_path / "hpc_ckpt_1.ckpt")
        assert find_last(made) == requeued

    def test_there_is_none(self, made: Trainer, tmp_path: Path) -> None:
        (tmp_path / "one").mkdir()
        (tmp_path / "one/last.ckpt").touch()
        with (
            pytest.warns(UserWarning, match="damaged"),
            pytest.raises(InputError, match=r"no whole checkpoint in .*one or .*two; give ModelCheckpoint a dirpath"),
        ):
            find_last(made)
