"""The benchmark of scripts/design_space.py, in small."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import design_space as main
import design_space_report as report
import design_space_sampling as sampling
import design_space_training as training
import pytest
import torch

F64 = torch.float64


@pytest.fixture(scope="module")
def digits() -> Any:
    return training.Digits()


def error(name: str, nfe: int = 35) -> float:
    """Relative error of the standard deviation of a Gaussian's samples."""
    return sampling.gaussian_error(sampling.samplers()[name], nfe)


def test_the_sampler_of_ve_is_by_far_the_worst_of_the_columns() -> None:
    others = [error(name) for name in ("VP", "iDDPM", "EDM, Heun", "EDM, DPM-Solver++(2M)")]
    assert error("VE") > 10 * max(others)


def test_every_rung_from_ve_to_edm_lowers_the_error() -> None:
    ladder = [error(name) for name in ("VE", "VE + Heun", "VE + Heun + EDM steps", "EDM, Heun")]
    assert ladder == sorted(ladder, reverse=True)
    assert ladder[0] > 10 * ladder[-1]


@pytest.mark.parametrize("nfe", [35, 65, 129, 255])
def test_heun_beats_euler_on_the_steps_of_edm(nfe: int) -> None:
    assert error("EDM, Heun", nfe) < error("EDM, Euler", nfe)
    assert error("EDM, DPM-Solver++(2M)", nfe) < error("EDM, Heun", nfe)


def test_rho_from_5_to_10_is_best() -> None:
    errors = {rho: sampling.gaussian_error(sampling.edm_heun(rho), 35) for rho in sampling.RHO}
    best = min(errors.values())
    assert all(errors[rho] < 1.2 * best for rho in (5, 7, 10))
    assert errors[2] > 3 * best
    assert errors[1] > 30 * best


def test_known_error_of_edm() -> None:
    assert error("EDM, Heun") == pytest.approx(0.527624637001 / 0.5 - 1, rel=1e-3)


@pytest.mark.parametrize("name", sampling.samplers())
def test_samplers_keep_to_their_number_of_calls(name: str) -> None:
    calls: list[int] = []

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return torch.zeros_like(x)

    sampling.samplers()[name](denoise, torch.ones(1, 1, dtype=F64), 17)
    assert len(calls) == 17


def test_the_exact_denoiser_is_the_mean_of_what_the_noise_may_hide() -> None:
    points = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    x, sigma = points[:2] + 0.3, torch.tensor([0.5, 2.0], dtype=F64)
    likelihood = torch.distributions.Normal(points, sigma[:, None, None]).log_prob(x[:, None]).sum(-1).exp()
    expected = likelihood @ points / likelihood.sum(1, keepdim=True)
    torch.testing.assert_close(sampling.finite(points)(x, sigma), expected)


def test_on_the_digits_edm_beats_ve_and_small_rho(digits: Any) -> None:
    points = digits.trained["image"].flatten(1).double()
    finite_error, columns = sampling.FiniteError(points, count=64, reference_steps=300), sampling.samplers()
    edm = finite_error(columns["EDM, Heun"], 35)
    assert finite_error.of_reference() < 1e-6
    assert finite_error(columns["VE"], 35) > 2 * edm
    assert finite_error(sampling.edm_heun(1.0), 35) > 3 * edm


def test_c_noise_of_every_row_covers_the_same_range() -> None:
    ends = torch.tensor([training.SIGMA_MIN, training.SIGMA_MAX])
    for preconditioning, _ in training.rows(0.8).values():
        torch.testing.assert_close(preconditioning(ends).c_noise, ends.log() / 4, rtol=0, atol=1e-4)


def test_a_row_of_edm_learns_in_a_few_steps(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "NUM_STEPS", 3)
    budget = training.Budget(steps=48, channels=8)
    found = training.train("EDM preconditioning and loss", 0, budget)
    before = training.untrained(training.rows(digits.sigma_data)["EDM preconditioning and loss"][0], digits)
    assert budget.marks() == [3, 6, 12, 24, 48]
    assert found["first_loss"] == pytest.approx(1, abs=0.2)  # F = 0 at first: every noise level at a loss of 1
    assert found["last_loss"] < 0.8 * found["first_loss"]
    assert found["frechet_distance"][-1] < before


def test_tables_keep_the_findings_above_them(tmp_path: Path) -> None:
    file, run = tmp_path / "report.md", {"frechet_distance": [3.0, 1.0]}
    made = {"versions": {}, "commit": "0", "workers": 1, "cpu_count": 1, "wall_seconds": 0.0, "cpu_seconds": 0.0}
    found = {
        "budget": {"batch_size": 8, "learning_rate": 0.1, "channels": 8, "dropout": 0.0},
        "seeds": [0, 1],
        "marks": [1, 2],
        "sigma_data": 0.8,
        "trained_on": 10,
        "held_out": 5,
        "floor": 0.5,
        "untrained": {"VP": 9.0, "EDM": 4.0},
        "runs": {"VP": [{"frechet_distance": [6.0, 2.0]}] * 2, "EDM": [run, run]},
        "made": made,
    }
    file.write_text(f"What we saw.\n\n{report.MARKER}\n\nold tables\n")
    report.write_report({"training": found}, file)
    text = file.read_text()
    assert text.startswith("What we saw.\n\n")
    assert "old tables" not in text
    assert "| EDM | 4 | 3 ± 0 | 1 ± 0 |" in text
    assert "| EDM | 2 | 2 |" in text


def test_the_script_writes_numbers_tables_and_a_plot(
    digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    few = partial(sampling.compare_samplers, count=2, churn_count=8)
    monkeypatch.setattr(main, "compare_samplers", lambda points: few(points[:50]))
    main.design_space(only="sampling", output=tmp_path)
    found = json.loads((tmp_path / "design_space.json").read_text())
    assert found.keys() == {"sampling"}
    assert found["sampling"]["made"]["cpu_seconds"] > 0
    assert found["sampling"]["errors"]["gaussian"]["EDM, Heun"][3] == pytest.approx(error("EDM, Heun"))
    assert "| EDM, Heun |" in (tmp_path / "design_space.md").read_text()
    assert (tmp_path / "design_space_sampling.png").stat().st_size < 200_000
    assert capsys.readouterr().out.count("at 35 NFE") == len(sampling.samplers())
