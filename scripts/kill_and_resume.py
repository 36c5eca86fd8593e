"""Kills runs at random moments, resumes them, and compares their ends: `python scripts/kill_and_resume.py`."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file

from lit_edm.loggers import read_rows
from lit_edm.sdxl.tiny import make_tiny_sdxl

ROOT = Path(__file__).parents[1]
STEPS, PIVOT, BETWEEN_CHECKPOINTS = 24, 12, 3
EXPORTS = "adapter/*.safetensors"


class TellStep(Callback):
    """Tells the outside, after every batch, how many optimizer steps there have been.

    Args:
        path: File to write it to.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Writes the number, which a killed process has written too."""
        Path(self.path).write_text(f"{trainer.global_step}")


@dataclass(frozen=True)
class Kill:
    """What a kill cost.

    Args:
        step: Optimizer steps that had been made.
        resumed: Those of the checkpoint that the run went on with; 0 if there was none.
        writing: Whether a checkpoint or an export was being written.
    """

    step: int
    resumed: int
    writing: bool


def main(
    kills: int = 50, seed: int = 0, jobs: int = 2, folder: str = "build/kill_and_resume", accelerator: str = "cpu"
) -> None:
    """Trains a tiny SDXL to the end, then as many runs as there are kills, each killed once and resumed.

    The run has a pivot and text encoders that learn for a while, accumulation, buckets, disk caches, two workers, the
    base as a teacher, dropout, averaged weights, pictures and exports. A kill is SIGKILL to all processes of a run at a
    moment between its start and its end, every second of them just after a step, which is when files are written. After
    it every checkpoint and export that is there has to load. At the end the last checkpoint, the log and the exports
    have to be those of the run that was left alone, bit for bit.

    Args:
        kills: Runs that are killed.
        seed: What the moments follow from.
        jobs: Runs at once.
        folder: Where the runs are; it is emptied.
        accelerator: Lightning's name of what to train on.
    """
    work = Path(folder).resolve()
    shutil.rmtree(work, ignore_errors=True)
    make_tiny_sdxl(work / "base")
    began = time.monotonic()
    start(config_of(work, "undisturbed", accelerator), None).wait()
    seconds = time.monotonic() - began
    expected = end_of(work / "undisturbed")
    dice = random.Random(seed)
    moments = [dice.uniform(0, seconds) for _ in range(kills)]
    steps = [dice.randrange(STEPS) if number % 2 else None for number in range(kills)]

    def kill(number: int) -> tuple[Kill, list[str]]:
        return disturbed(work, f"run{number}", moments[number], steps[number], accelerator, expected)

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(kill, range(kills)))
    report(done, seconds)


def report(done: list[tuple[Kill, list[str]]], seconds: float) -> None:
    """Prints what came of all kills; exits with 1 if anything was lost."""
    lost = [kill.step - kill.resumed for kill, _ in done]
    wrong = [fault for _, faults in done for fault in faults]
    phases = Counter(
        "before the first step" if not kill.step else "tokens learn" if kill.step < PIVOT else "pivoted"
        for kill, _ in done
    )
    print(f"{STEPS} optimizer steps, a checkpoint every {BETWEEN_CHECKPOINTS}, {seconds:.0f} s undisturbed")
    print(f"killed: {len(done)} ({', '.join(f'{count} {phase}' for phase, count in sorted(phases.items()))})")
    print(f"killed while a file was being written: {sum(kill.writing for kill, _ in done)}")
    print(f"steps made again after a kill: at most {max(lost)}, {sum(lost) / len(lost):.1f} in the mean")
    print(f"ends that are bit-equal to the undisturbed one: {sum(not faults for _, faults in done)} of {len(done)}")
    for fault in wrong:
        print(f"  {fault}")
    sys.exit(bool(wrong))


def disturbed(
    work: Path, name: str, moment: float, step: int | None, accelerator: str, expected: dict[str, Any]
) -> tuple[Kill, list[str]]:
    """Kills a run after so many seconds, or just after a step, resumes it, and returns what was wrong in the end."""
    folder = work / name
    while not kill_once(config := config_of(work, name, accelerator), moment, step):
        shutil.rmtree(folder)  # it had ended: the undisturbed run was slower
        moment *= 0.8
    made, writing = step_of(folder), any(folder.rglob("*.part"))
    faults = [
        f"{name}, killed at step {made}: {path.name} does not load" for path in files_of(folder) if not loads(path)
    ]
    newest = max(
        (torch.load(path, weights_only=True)["global_step"] for path in folder.rglob("*.ckpt") if loads(path)),
        default=0,
    )
    if start(config, "last" if newest else None).wait():
        faults.append(f"{name}, killed at step {made}: the resumed run failed, see {folder / 'log.txt'}")
    elif different := differences(expected, end_of(folder)):
        faults.append(f"{name}, killed at step {made}: {different[0]} differs, and {len(different) - 1} more")
    if made - newest > BETWEEN_CHECKPOINTS:
        faults.append(f"{name}, killed at step {made}: resumed at {newest}")
    if not faults:
        shutil.rmtree(folder)
    return Kill(made, newest, writing), faults


def kill_once(config: Path, moment: float, step: int | None) -> bool:
    """Starts a run and kills it after so many seconds, or just after a step; returns whether it was there still."""
    process, end = start(config, None), time.monotonic() + moment
    while process.poll() is None and (time.monotonic() < end if step is None else step_of(config.parent) <= step):
        time.sleep(0.001)
    time.sleep(0 if step is None else moment % 0.02)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def start(config: Path, ckpt_path: str | None) -> subprocess.Popen[bytes]:
    """Starts a run in a process group of its own, its output in log.txt."""
    command = [sys.executable, "-m", "lit_edm", "fit", "--config", str(config)]
    resume = ["--ckpt_path", ckpt_path] if ckpt_path else []
    paths = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    with (config.parent / "log.txt").open("ab") as log:
        return subprocess.Popen([*command, *resume], stdout=log, stderr=log, env=environment, start_new_session=True)


def step_of(folder: Path) -> int:
    """Returns the optimizer steps that a run has told of."""
    path = folder / "step"
    return int(path.read_text() or 0) if path.exists() else 0


def files_of(folder: Path) -> list[Path]:
    """Returns the checkpoints and the exports of a run."""
    return [*folder.rglob("*.ckpt"), *folder.rglob("*.safetensors")]


def loads(path: Path) -> bool:
    """Tells whether a file is whole."""
    try:
        torch.load(path, weights_only=True) if path.suffix == ".ckpt" else load_file(path)
    except Exception:  # whatever half a file leads to
        return False
    return True


def end_of(folder: Path) -> dict[str, Any]:
    """Returns all that a run ends with, by name."""
    kept = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    parts = {key: kept[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}
    average = kept["callbacks"]["ExponentialMovingAverage"]
    exports = {path.name: load_file(path) for path in sorted(folder.glob(EXPORTS))}
    rows = read_rows(folder / "metrics.csv")
    log = [{key: cell for key, cell in row.items() if not key.startswith("pace/")} for row in rows]  # times differ
    return dict(leaves({**parts, "average": average, "exports": exports, "metrics.csv": log}))


def leaves(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    """Returns what a nested state is made of, by name."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    return [(name, tree)] if pairs is None else [leaf for key, part in pairs for leaf in leaves(part, f"{name}/{key}")]


def differences(expected: dict[str, Any], end: dict[str, Any]) -> list[str]:
    """Returns the names of what is not equal to the last bit."""
    names = expected.keys() | end.keys()
    return sorted(name for name in names if not same(expected.get(name), end.get(name)))


def same(a: Any, b: Any) -> bool:
    """Tells whether two parts of a state are equal to the last bit."""
    return isinstance(b, torch.Tensor) and a.equal(b) if isinstance(a, torch.Tensor) else a == b


def config_of(work: Path, name: str, accelerator: str) -> Path:
    """Writes the config of a run, and returns its path."""
    folder = work / name
    folder.mkdir()
    base = yaml.safe_load((ROOT / "configs" / "sdxl_advanced.yaml").read_text())
    model, data, trainer = base["model"]["init_args"], base["data"]["init_args"], base["trainer"]
    del model["variant"], model["vae"]
    model |= {"pretrained": str(work / "base"), "gradient_checkpointing": False}
    data |= {"root": str(ROOT / "data" / "icons3d"), "resolution": 64, "buckets": {"step": 16}, "batch_size": 4}
    data["latent_cache"]["init_args"]["folder"] = str(folder / "latents")
    trainer |= {"max_steps": STEPS, "accumulate_grad_batches": 2, "accelerator": accelerator, "precision": "32-true"}
    trainer |= {"default_root_dir": str(folder), "log_every_n_steps": 1}
    for logger in trainer["logger"]:
        logger["init_args"] = {"save_dir": str(work), "name": name, "version": ""}
    for callback in trainer["callbacks"]:
        settings = callback.setdefault("init_args", {})
        match callback["class_path"]:
            case "ValidationImages":
                settings |= {"every_n_steps": PIVOT, "resolution": 32, "prompts": settings["prompts"][:1]}
                settings["sampler"]["init_args"]["num_steps"] = 2
            case "ModelCheckpoint":
                settings |= {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": BETWEEN_CHECKPOINTS}
    trainer["callbacks"].append({"class_path": "kill_and_resume.TellStep", "init_args": {"path": str(folder / "step")}})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(base))
    return path


if __name__ == "__main__":
    auto_cli(main)
