"""Logs that survive what a run survives."""

import csv
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, BinaryIO

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lit_edm.errors import InputError
from lit_edm.files import telling_of_no_room, write_whole

__all__ = ["ResumableCSVLogger"]

Row = dict[str, str]


class ResumableCSVLogger(CSVLogger):
    """Writes metrics.csv as Lightning's CSVLogger does, and goes on with it when a run is resumed.

    Lightning's deletes what is there. This one keeps the rows before the step that a run goes on with, so that the file
    is that of a run that never stopped. SeamlessResume, which every run of the command line has, tells it that step.
    Without being told it begins a new file, as a new run does.

    Args:
        save_dir: Folder of all logs, on this machine.
        name: Folder of the run in it; none if empty.
        version: Folder of this version of the run; empty to write to the run's folder itself, next free number if not
            given, which is another one after a resume.
        prefix: What to put before names of metrics.
        flush_logs_every_n_steps: Steps between writes, for those who log by hand: Lightning has each row written.

    Raises:
        InputError: save_dir is on another machine.
    """

    def __init__(
        self,
        save_dir: str | Path,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        if "://" in str(save_dir):
            raise InputError(f"ResumableCSVLogger.save_dir is {save_dir}: name a folder here, or use CSVLogger")
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsFile":
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = MetricsFile(self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def go_on_from(self, step: int) -> None:
        """Keeps the rows of steps before this one, and writes after them."""
        self.experiment.go_on_from(step)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Writes the rows that a checkpoint goes on after."""
        self.save()


class MetricsFile(ExperimentWriter):
    """A CSV file of rows, each of a step and what was logged together; of several alike the last one counts.

    Args:
        log_dir: Folder of metrics.csv.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        self.newest: list[Row] = []
        self.newest_at = 0
        self.begun = False

    def _check_log_dir_exists(self) -> None:
        """Leaves what is there until there is something to write: the run may go on with it."""

    def go_on_from(self, step: int) -> None:
        """Keeps the rows of steps before this one."""
        rows = [row for row in read_rows(self.path) if int(row["step"]) < step]
        self._rewrite(rows)

    def save(self) -> None:
        """Writes the rows that were logged since, at the end of the file unless it has to change before that."""
        rows, self.metrics = [as_text(row) for row in self.metrics], []
        rows = [row for row in rows if row not in self.newest]
        if not rows:
            return
        if not self.begun or set().union(*rows) - set(self.metrics_keys):
            before = read_rows(self.path) if self.begun else []
            self._rewrite([old for old in before if not any(alike(row, old) for row in rows)] + rows)
            return
        kept = [old for old in self.newest if not any(alike(row, old) for row in rows)]
        with telling_of_no_room(self.path), self.path.open("r+b") as file:
            file.seek(self.newest_at)
            file.truncate()
            self._write(file, [*kept, *rows])

    def _rewrite(self, rows: Sequence[Row]) -> None:
        self.metrics_keys = sorted(set().union(*rows))
        write_whole(self.path, lambda part: self._fill(part, rows))
        self.begun = True

    def _fill(self, part: Path, rows: Sequence[Row]) -> None:
        with part.open("wb") as file:
            file.write(as_line(self.metrics_keys))
            self._write(file, rows)

    def _write(self, file: BinaryIO, rows: Sequence[Row]) -> None:
        """Writes rows where a file is at, and notes the last step's, which may be replaced, and where they begin."""
        self.newest, self.newest_at = [], file.tell()
        for row in rows:
            if self.newest and row["step"] != self.newest[-1]["step"]:
                self.newest, self.newest_at = [], file.tell()
            file.write(as_line([row.get(key, "") for key in self.metrics_keys]))
            self.newest.append(row)


def as_text(row: Mapping[str, Any]) -> Row:
    """Returns a row as it is read from a file."""
    return {key: str(value) for key, value in row.items()}


def alike(row: Row, other: Row) -> bool:
    """Tells whether two rows are of the same metrics in the same step."""
    return row["step"] == other["step"] and row.keys() == other.keys()


def read_rows(path: Path) -> list[Row]:
    """Reads rows without their empty cells; no last line that a killed process did not finish, and no file no rows."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    rows = ({key: cell for key, cell in row.items() if key and cell} for row in csv.DictReader(whole.splitlines()))
    return [row for row in rows if row.get("step", "").isdecimal()]


def as_line(cells: Sequence[str]) -> bytes:
    """Returns a line of a CSV file."""
    line = StringIO(newline="")
    csv.writer(line).writerow(cells)
    return line.getvalue().encode()
