"""Times what keeps work safe, as a share of training: `python scripts/benchmark_safety.py`."""

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from benchmark_setup import Settings, build
from jsonargparse import auto_cli
from lightning.pytorch.profilers import SimpleProfiler

from lit_edm.sdxl.sizes import SizeName

CHECKS = ("SkipNonFinite", "EndOnSigterm", "SeamlessResume", "SDXLModule.on_train_batch_start")
"""Who does something in every step: gradients are looked at, signals are asked for, generators are seeded."""


def main(size: SizeName = "small", side: int = 256, batch_size: int = 3, steps: int = 24, interval: int = 250) -> None:
    """Trains as configs/sdxl_pivotal.yaml does, and prints the share of a run that checks and checkpoints take.

    Args:
        size: Of the base, whose weights are random.
        side: Height and width of the images in pixels.
        batch_size: Images in a step.
        steps: Steps to time, a multiple of 4: a checkpoint, with its export, is written every quarter of them.
        interval: Steps between checkpoints that the share is of; 250 in the configs.
    """
    with TemporaryDirectory() as folder:
        keep = {"dirpath": f"{folder}/checkpoints", "every_n_train_steps": steps // 4, "save_last": "true"}
        overrides = (
            "--trainer.enable_checkpointing=true",
            f"--trainer.max_steps={steps}",
            *(f"--trainer.callbacks+={name}" for name in ("SkipNonFinite", "SaveAdapter", "ModelCheckpoint")),
            *(f"--trainer.callbacks.{key}={value}" for key, value in keep.items()),
        )
        cli = build(Settings(size, side, batch_size, overrides=overrides), Path(folder))
        profiler = SimpleProfiler(folder, "profile")  # whose table is of no use here
        cli.trainer.profiler = profiler  # type: ignore[attr-defined]
        cli.trainer.fit(cli.model, cli.datamodule)
        written = sum(path.stat().st_size for path in Path(folder, "checkpoints").glob("last.ckpt"))
    seconds = {action: sum(durations) for action, durations in profiler.recorded_durations.items()}
    saving = sum(time for action, time in seconds.items() if "ModelCheckpoint" in action) / 4
    # The median: in one step, the pivot's, captions are encoded, and at the start all weights are looked at.
    checks = {a: times for a, times in profiler.recorded_durations.items() if any(name in a for name in CHECKS)}
    checking = sum(median(times) for times in checks.values() if len(times) == steps)
    once = sum(sum(times) for action, times in checks.items() if "on_train_start" in action)
    step = seconds["run_training_epoch"] / steps - saving * 4 / steps
    print(f"{size}, {side} px, batch {batch_size}, {torch.get_num_threads()} threads")
    print(f"a step          {1e3 * step:9.1f} ms")
    print(f"its checks      {1e3 * checking:9.1f} ms, {checking / step:.2%}")
    print(f"at the start    {1e3 * once:9.1f} ms, once")
    print(f"a checkpoint    {1e3 * saving:9.1f} ms, with its export; {written / 1e6:.1f} MB")
    print(f"both, one checkpoint in {interval} steps: {(checking + saving / interval) / step:.2%} of the run")


if __name__ == "__main__":
    auto_cli(main)
