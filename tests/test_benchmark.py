"""The benchmark of training, in small: its numbers fit together, and it measures what it says."""

import json
from pathlib import Path
from typing import Any

import benchmark as main
import benchmark_memory as memory
import benchmark_phases as phases
import benchmark_report as report
import benchmark_setup as setup
import pytest
import torch

from lit_edm.errors import InputError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
QUICK = {"size": "tiny", "side": 16, "batch_size": 2, "steps": 2, "warmup": 1, "profiled": 2, "memory": False}


def train(folder: Path, *callbacks: Any, **settings: Any) -> Any:
    """Trains a tiny base; returns the module."""
    cli = setup.build(setup.Settings(**(QUICK | {"accelerator": "cpu"} | settings)), folder)
    cli.trainer.callbacks.extend(callbacks)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli.model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two recorded runs, with the table of both."""
    output = tmp_path_factory.mktemp("benchmarks")
    (output / "training.md").write_text("What we saw.\n\n")
    options = [f"--{key}={json.dumps(value)}" for key, value in QUICK.items() if key != "size"]
    options += ["--size=tiny", "--accelerator=cpu", "--clock=cpu", f"--output={output}"]
    main.main(options)
    main.main([*options, "--pivot=after", "--adapter=DoRA", "--gradient_checkpointing=true", "--note=all at once"])
    text = (output / "training.md").read_text()
    found = json.loads((output / "training.json").read_text())
    assert text == f"What we saw.\n\n{report.report(found)}"
    return found


def test_numbers_fit_together(runs: list[dict[str, Any]]) -> None:
    assert [list(run["parts"]) for run in runs] == [["before", "after"], ["after"]]
    for run in runs:
        assert {"date", "commit", "chip", "threads", "versions", "settings", "parameters", "trained"} <= run.keys()
        for part in run["parts"].values():
            assert part["ratio"] == pytest.approx(part["step"] / part["floor"])
            assert part["images_per_second"] == pytest.approx(2 / part["step"])
            assert part["utilisation"] == pytest.approx(part["flop"] / part["step"] / run["matmul_flops"])
            assert part["phases"].keys() == {*phases.PHASES, "rest"}
            assert min(part["phases"].values()) >= 0
            assert part["phases"]["rest"] < 0.5 * sum(part["phases"].values())


def test_arithmetic_of_the_parts(runs: list[dict[str, Any]]) -> None:
    before, after = (runs[0]["parts"][part]["flop"] for part in ("before", "after"))
    assert before > after  # text encoders, and the gradient that reaches them
    assert runs[1]["parts"]["after"]["flop"] == pytest.approx(after, rel=0.05)  # nothing is counted twice
    assert runs[1]["trained"] > runs[0]["trained"]


def test_the_table_says_what_is_unusual_in_a_run(runs: list[dict[str, Any]]) -> None:
    first, second = (report.what(run) for run in runs)
    assert first == "tiny, 16 px, batch 2; accelerator: cpu"
    assert second.endswith("adapter: DoRA; gradient_checkpointing: True; accelerator: cpu; all at once")


def test_the_page_is_that_of_the_recorded_runs() -> None:
    recorded = json.loads((BENCHMARKS / "training.json").read_text(encoding="utf-8"))
    text = (BENCHMARKS / "training.md").read_text(encoding="utf-8")
    assert report.MARKER + text.partition(report.MARKER)[2] == report.report(recorded)


def test_bare_networks_get_what_training_gives_them(tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {"training": [], "floor": []}

    class Watch(phases.Stopwatch):
        """Notes what the UNet gets, by whom."""

        who = "training"

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            pl_module.denoiser.unet.register_forward_pre_hook(self.note, with_kwargs=True)

        def note(self, unet: Any, args: Any, kwargs: Any) -> None:
            tensors = [*args, *kwargs["added_cond_kwargs"].values()]
            about = [(value.shape, value.dtype, value.requires_grad) for value in tensors]
            if all(value.device.type != "meta" for value in tensors):
                seen[self.who].append((about, torch.is_autocast_enabled("cpu")))

        def run_floor(self, part: str, passes: int) -> float:
            self.who = "floor"
            seconds = super().run_floor(part, passes)
            self.who = "training"
            return seconds

    settings = {"precision": "bf16-mixed", "profiled": 1}
    train(tmp_path, Watch(setup.Settings(**(QUICK | settings))), **settings)
    before, after = seen["floor"][0], seen["floor"][-1]
    assert seen["floor"] == [before] * 3 + [after] * 3
    assert seen["training"] == [before] * 4 + [after] * 4
    assert before != after


def test_training_is_what_it_is_without_the_watch(tmp_path: Path) -> None:
    watched = train(tmp_path / "a", phases.Stopwatch(setup.Settings(**QUICK)))
    alone = train(tmp_path / "b")
    for parameters in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(*parameters)


def test_phases_add_up_to_all_there_is() -> None:
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    profiler = phases.PhaseProfiler(lambda: next(times))
    with profiler.profile("run_training_batch"):  # what began before counts from now on
        profiler.begin()
        with profiler.profile("[Strategy]SingleDeviceStrategy.training_step"), profiler.profile("UNet forward"):
            pass
    found = profiler.end()
    assert {name: seconds for name, seconds in found.items() if seconds} == {
        "rest": 1.0 + 5.0 + 6.0,
        "loss": 2.0 + 4.0,
        "UNet forward": 3.0,
    }
    assert sum(found.values()) == 21.0


def test_peaks_are_those_of_processes_of_their_own() -> None:
    found = memory.peaks(setup.Settings(**(QUICK | {"accelerator": "cpu"})), "before")
    assert found.keys() == {"floor", "start", "steps"}
    assert all(size > 100 * 2**20 for size in found.values())
    assert found["steps"] >= found["start"]


@pytest.mark.parametrize("wrong", [{"steps": 3, "turn": 2}, {"warmup": 0}, {"profiled": 0}])
def test_counts_that_do_not_divide_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="steps a multiple of turn"):
        setup.Settings(**(QUICK | wrong))
