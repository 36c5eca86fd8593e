"""Where a resumed run goes on, in Lightning's own account of it."""

from typing import Any


def go_on_from_last_step(fit_loop: dict[str, Any], accumulate: int) -> bool:
    """Makes a checkpoint's place in the epoch that of its weights, which are those after the last optimizer step.

    Lightning counts batches. If it stops between two steps, because of a signal, an error or a time limit, those whose
    gradients were only accumulated would be lost: they are trained with again. And an epoch that trainer.max_steps cut
    short is not over: a run that is extended goes on with the rest of it.

    Args:
        fit_loop: State of the fit loop in a checkpoint, which is changed.
        accumulate: Batches whose gradients make one step.

    Returns:
        Whether there are batches to train with again.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]
    now = batches["current"]
    if now["processed"] > 0 and epochs["current"]["processed"] == epochs["current"]["started"]:
        _set(epochs, ["ready"], epochs["current"]["started"])
        _set(epochs, ["processed", "completed"], epochs["current"]["started"] - 1)
        if batches["is_last_batch"]:  # else Lightning ends the epoch a second time
            _set(batches, ["completed"], now["processed"] - 1)
    stepped = now["processed"] % accumulate == 0 or batches["is_last_batch"]
    if now["ready"] == now["processed"] and stepped:
        return False
    _set(batches, ["ready", "started", "processed", "completed"], now["processed"] - now["processed"] % accumulate)
    batches["is_last_batch"] = False
    return True


def _set(progress: dict[str, dict[str, int]], counts: list[str], value: int) -> None:
    """Sets counts of the current epoch or run to a value, and those of the whole run along with them."""
    for count in counts:
        progress["total"][count] += value - progress["current"][count]
        progress["current"][count] = value
