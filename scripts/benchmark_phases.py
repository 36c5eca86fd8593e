"""Times the phases of training steps, and steps against the bare networks."""

from collections.abc import Callable
from typing import Any

import torch
from benchmark_floor import Floor, clock
from benchmark_setup import Settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import Profiler

from lit_edm.modules import SDXLModule

PHASES = ("data", "VAE", "text", "UNet forward", "loss", "backward", "clip", "optimizer", "logging", "callbacks")
ACTIONS = {
    "train_dataloader_next": "data",
    "transfer": "data",
    "batch_to_device": "data",
    ".training_step": "loss",
    ".backward": "backward",
    ".configure_gradient_clipping": "clip",
    ".optimizer_step": "optimizer",
    ".optimizer_zero_grad": "optimizer",
    "[Callback]": "callbacks",
    "[LightningModule]": "callbacks",
}
"""The phase of what Lightning does, by parts of the names that it has for it; the first that fits."""
METHODS = {"encode": "VAE", "denoise": "text", "log": "logging", "log_dict": "logging"}
"""The phase of a module's methods, which Lightning has no name for."""


def phase_of(action: str) -> str:
    """Returns the phase of what Lightning does; the rest is what is none of them."""
    if action in PHASES:
        return action
    return next((phase for part, phase in ACTIONS.items() if part in action), "rest")


class PhaseProfiler(Profiler):
    """Adds up the time of each phase while it is on, so that all of them together are the whole.

    What is done within something else counts for itself alone: the loss is a training step without the UNet in it.

    Args:
        now: Tells the time.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__()
        self.now = now
        self.on = False
        self.open: list[str] = []
        self.seconds: dict[str, float] = {}

    def begin(self) -> None:
        """Begins to add up."""
        self.seconds = dict.fromkeys((*PHASES, "rest"), 0.0)
        self.since, self.on = self.now(), True

    def end(self) -> dict[str, float]:
        """Returns the seconds of each phase since the beginning."""
        self.account()
        self.on = False
        return self.seconds

    def start(self, action_name: str) -> None:
        """Notes that something begins."""
        self.account()
        self.open.append(phase_of(action_name))

    def stop(self, action_name: str) -> None:
        """Notes that it is over."""
        self.account()
        self.open.pop()

    def account(self) -> None:
        """Gives the time since something last began or ended to what was going on."""
        if self.on:
            before, self.since = self.since, self.now()
            self.seconds[self.open[-1] if self.open else "rest"] += self.since - before

    def watch(self, trainer: Trainer, module: SDXLModule) -> None:
        """Times what Lightning has no name for: methods of module and loggers, and the UNet."""
        for name, phase in METHODS.items():
            setattr(module, name, self.timed(getattr(module, name), phase))
        for logger in trainer.loggers:
            for name in ("log_metrics", "save"):
                setattr(logger, name, self.timed(getattr(logger, name), "logging"))
        unet = module.denoiser.unet
        unet.register_forward_pre_hook(lambda *_: self.start("UNet forward"))
        unet.register_forward_hook(lambda *_: self.stop("UNet forward"))

    def timed(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """Returns a method that counts for a phase."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.profile(phase):
                return method(*args, **kwargs)

        return call


class Stopwatch(Callback):
    """Times steps and passes of the bare networks in turns, in one process, and then the phases of further steps.

    Args:
        settings: Of the benchmark.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.found: dict[str, dict[str, Any]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        """Begins with the first step, in which much is done for the first time."""
        s = self.settings
        self.now = clock(s.clock, pl_module.device)
        self.profiler = PhaseProfiler(self.now)
        trainer.profiler = self.profiler  # type: ignore[attr-defined]
        self.profiler.watch(trainer, pl_module)
        precision = trainer.precision_plugin.forward_context
        self.floors = {part: Floor(pl_module, part == "before", s.batch_size, s.side, precision) for part in s.parts}
        self.since = self.now()

    def on_train_batch_end(self, trainer: Trainer, pl_module: SDXLModule, *_: Any) -> None:
        """Takes the time where something ends that is measured."""
        s, made = self.settings, trainer.global_step
        part, timed = s.parts[(made - 1) // s.length], (made - 1) % s.length + 1 - s.warmup
        if made == 1:
            self.first_step = self.now() - self.since
        if timed == 0:
            self.found[part] = {"steps": [], "floors": [], "flop": self.floors[part].flop()}
            self.run_floor(part, 1)
        elif 0 < timed <= s.steps and timed % s.turn == 0:
            self.end_turn(self.found[part], part)
        if timed == s.steps:
            self.profiler.begin()
        elif 0 <= timed < s.steps and timed % s.turn == 0:
            self.begin_turn()
        elif timed == s.steps + s.profiled:
            self.found[part]["phases"] = {name: sum_ / s.profiled for name, sum_ in self.profiler.end().items()}

    def begin_turn(self) -> None:
        """Begins to time steps."""
        self.since = self.now()
        self.watch_for_waiting(self.settings.no_sync)

    def end_turn(self, found: dict[str, Any], part: str) -> None:
        """Notes the seconds of a step, and of a pass of the bare networks, which come next."""
        self.watch_for_waiting(False)
        turn = self.settings.turn
        found["steps"].append((self.now() - self.since) / turn)
        found["floors"].append(self.run_floor(part, turn) / turn)

    def run_floor(self, part: str, passes: int) -> float:
        """Returns the seconds that passes of the bare networks take."""
        start = self.now()
        for _ in range(passes):
            self.floors[part]()
        return self.now() - start

    def watch_for_waiting(self, on: bool) -> None:
        """Lets CUDA fail where the host waits for it, or not."""
        if self.settings.no_sync:
            torch.cuda.set_sync_debug_mode("error" if on else "default")
