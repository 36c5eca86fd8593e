import csv
from pathlib import Path

import pytest

from lit_edm.errors import InputError
from lit_edm.loggers import ResumableCSVLogger, read_rows


def logged(folder: Path, steps: range, go_on_from: int | None = None, **more: float) -> bytes:
    """Logs a loss for each step, and more after the third, in a run of its own; returns the file."""
    logger = ResumableCSVLogger(folder, "", "")
    if go_on_from is not None:
        logger.go_on_from(go_on_from)
    for step in steps:
        logger.log_metrics({"train/loss": 1 / (step + 1), "epoch": step // 4}, step)
        logger.save()
        if step >= 2:
            logger.log_metrics({"val/loss": step / 3, **more}, step)
            logger.save()
    return (folder / "metrics.csv").read_bytes()


@pytest.mark.parametrize("last", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("go_on_from", [0, 1, 2, 5])
def test_a_resumed_run_has_the_rows_of_one_that_never_stopped(tmp_path: Path, last: int, go_on_from: int) -> None:
    whole = logged(tmp_path / "whole", range(10))
    logged(tmp_path / "killed", range(max(last, go_on_from)))
    assert logged(tmp_path / "killed", range(go_on_from, 10), go_on_from) == whole


def test_a_new_run_begins_a_new_file(tmp_path: Path) -> None:
    logged(tmp_path, range(10))
    assert b"0.1\r\n" not in logged(tmp_path, range(5))
    assert logged(tmp_path, range(5)) == logged(tmp_path / "other", range(5))


def test_a_line_that_is_half_written_is_written_again(tmp_path: Path) -> None:
    whole = logged(tmp_path / "whole", range(10))
    for length in (0, 3, 30, len(whole) - 3, len(whole) - 1):
        (tmp_path / "metrics.csv").write_bytes(whole[:length])
        rows = read_rows(tmp_path / "metrics.csv")
        assert all(row["step"].isdecimal() for row in rows)
        done = int(rows[-1]["step"]) if rows else 0
        assert logged(tmp_path, range(done, 10), done) == whole


def test_new_columns_leave_earlier_rows_empty_there(tmp_path: Path) -> None:
    logged(tmp_path, range(5))
    logged(tmp_path, range(5, 7), 5, d=2.0)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["d", "epoch", "step", "train/loss", "val/loss"]
    assert [row["d"] for row in rows if row["val/loss"]] == ["", "", "", "2.0", "2.0"]


def test_what_is_logged_again_is_there_once(tmp_path: Path) -> None:
    logger = ResumableCSVLogger(tmp_path, "", "")
    for loss in (1.0, 1.0, 2.0):
        logger.log_metrics({"loss": loss}, 3)
        logger.log_metrics({"other": 5.0}, 3)
        logger.after_save_checkpoint(None)
    assert read_rows(tmp_path / "metrics.csv") == [{"step": "3", "other": "5.0"}, {"step": "3", "loss": "2.0"}]


def test_what_is_logged_again_costs_no_more_the_longer_the_file(tmp_path: Path) -> None:
    """Accumulated batches log one step again and again: its rows are replaced, and the rest is left alone."""
    logged(tmp_path, range(50))
    logger = ResumableCSVLogger(tmp_path, "", "")
    logger.go_on_from(50)
    logger.log_metrics({"train/loss": 0.5, "epoch": 12}, 50)
    logger.save()
    file, before = (tmp_path / "metrics.csv").stat().st_ino, (tmp_path / "metrics.csv").read_bytes()
    for loss in (0.25, 0.125):
        logger.log_metrics({"train/loss": loss, "epoch": 12}, 50)
        logger.save()
    assert (tmp_path / "metrics.csv").stat().st_ino == file
    head, _, tail = before.rpartition(b",0.5,")
    assert (tmp_path / "metrics.csv").read_bytes() == head + b",0.125," + tail


def test_a_remote_folder_is_refused() -> None:
    with pytest.raises(InputError, match="use CSVLogger"):
        ResumableCSVLogger("s3://bucket/logs")
