"""Logs that survive what a run survives."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
        replaces = any(alike(row, old) for row in rows for old in self.newest)
        if not self.begun or replaces or set().union(*rows) - set(self.metrics_keys):
            before = read_rows(self.path) if self.begun else []
            self._rewrite([old for old in before if not any(alike(row, old) for row in rows)] + rows)
            return
        with telling_of_no_room(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.metrics_keys).writerows(rows)
        self.newest = of_last_step([*self.newest, *rows])

    def _rewrite(self, rows: Sequence[Row]) -> None:
        self.metrics_keys = sorted(set().union(*rows))
        write_whole(self.path, lambda part: write_rows(part, self.metrics_keys, rows))
        self.newest, self.begun = of_last_step(rows), True


def as_text(row: Mapping[str, Any]) -> Row:
    """Returns a row as it is read from a file."""
    return {key: str(value) for key, value in row.items()}


def alike(row: Row, other: Row) -> bool:
    """Tells whether two rows are of the same metrics in the same step."""
    return row["step"] == other["step"] and row.keys() == other.keys()


def of_last_step(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows of the same step as the last one."""
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def read_rows(path: Path) -> list[Row]:
    """Reads rows without their empty cells; no last line that a killed process did not finish, and no file no rows."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    rows = ({key: cell for key, cell in row.items() if key and cell} for row in csv.DictReader(whole.splitlines()))
    return [row for row in rows if row.get("step", "").isdecimal()]


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Writes a header and rows."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
