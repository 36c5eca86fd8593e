"""Work before training that the processes of a run share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.progress import track

Work = TypeVar("Work")


@dataclass(frozen=True)
class Team:
    """The processes of a run, of which the first shows what there is to wait for.

    Args:
        rank: Number of this process.
        size: Number of processes.
        wait: Waits until all have come as far.
    """

    rank: int = 0
    size: int = 1
    wait: Callable[[], object] = lambda: None

    def share(self, work: Sequence[Work], title: str) -> Iterator[Work]:
        """Yields this process's part of work, and in the end waits for the others."""
        yield from self.all(work[self.rank :: self.size], title)
        self.wait()

    def all(self, work: Sequence[Work], title: str) -> Iterator[Work]:
        """Yields all of the work, with a progress bar if there is any."""
        yield from track(work, title, disable=not work or self.rank > 0)
