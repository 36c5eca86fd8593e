"""Random numbers of a batch, which several processes may share out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed
from torch import Tensor


class Share:
    """The rows that are this process's of a batch that several processes share out.

    What is random about them is drawn for the whole batch, by each process from the same stream, and each keeps its own
    rows: so W processes train as one does with the whole batch. The global generators are left as they are.

    Args:
        seed: What the stream follows from, the same on all processes.
        first: Number of this process's first row in the batch.
        total: Rows of the batch. Rows beyond its end, which make processes' shares equal, repeat the last.
    """

    def __init__(self, seed: int, first: int, total: int) -> None:
        self.seed = seed
        self.first = first
        self.total = total
        self._states: list[Tensor] = []

    def rows(self, count: int, draw: Callable[[int], Tensor]) -> Tensor:
        """Returns this process's rows, `count` of them, of what is drawn for all."""
        with self._stream():
            whole = draw(self.total)
        rows = torch.arange(self.first, self.first + count, device=whole.device)
        return whole.index_select(0, rows.clamp(max=self.total - 1))

    @contextmanager
    def _stream(self) -> Iterator[None]:
        own = _get_states()
        _set_states(self._states) if self._states else torch.manual_seed(self.seed)
        try:
            yield
        finally:
            self._states = _get_states()
            _set_states(own)


_share: ContextVar[Share | None] = ContextVar("share", default=None)


@contextmanager
def sharing(share: Share) -> Iterator[None]:
    """Lets `drawn` and `gathered` know that the batch is a share."""
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def drawn(count: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Returns `count` rows of random numbers.

    Args:
        count: Rows of the batch on this process.
        draw: Draws a number of rows from the global generators.
    """
    share = _share.get()
    return draw(count) if share is None else share.rows(count, draw)


def unit_noise_like(x: Tensor, axes: int | None = None) -> Tensor:
    """Draws N(0, I) of the shape of a batch x, or of its first axes; x's layout in memory does not matter."""
    return drawn(len(x), lambda count: torch.randn(count, *x.shape[1:axes], dtype=x.dtype, device=x.device))


def gathered(rows: Tensor) -> Tensor:
    """Returns the rows of the whole batch, in order, given those of this process."""
    share = _share.get()
    if share is None:
        return rows
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)[: share.total]


def _get_states() -> list[Tensor]:
    """Returns the states of the global generators, of the CPU and of the current GPU where there is one."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states


def _set_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
