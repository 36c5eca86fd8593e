"""What all parts have in common: values that can be named in YAML, checked when they are made."""

import copy
import dataclasses
import inspect
import pickle
import re
from dataclasses import FrozenInstanceError, is_dataclass
from math import inf, nan
from typing import Any

import jsonargparse
import pytest

import lit_edm.edm as edm
from lit_edm.edm import (
    AdaptiveNoise,
    DiffusionLoss,
    DPMSolverSampler,
    EDMLoss,
    EDMPreconditioning,
    EDMTrajectory,
    EDMWeighting,
    EulerSampler,
    HeunSampler,
    IDDPMNoise,
    IDDPMPreconditioning,
    IDDPMTrajectory,
    InverseTransform,
    LearnedWeighting,
    LogNormal,
    LogUniform,
    LossWeighting,
    MinSNRWeighting,
    NoiseDistribution,
    Preconditioning,
    Sampler,
    ScaledLogNormal,
    SoftMinSNRWeighting,
    TimestepSchedule,
    Trajectory,
    TruncatedSNRWeighting,
    UniformKarras,
    VETrajectory,
    VPNoise,
    VPPreconditioning,
    VPTrajectory,
)

BASES = (NoiseDistribution, LossWeighting, Preconditioning, DiffusionLoss, Sampler, Trajectory)
CLASSES = [c for c in vars(edm).values() if inspect.isclass(c) and issubclass(c, BASES) and not inspect.isabstract(c)]
PARTS = [c for c in [*CLASSES, TimestepSchedule] if is_dataclass(c)]

WRONG: list[tuple[type, str, Any]] = [
    (TimestepSchedule, "num_timesteps", 1),
    (TimestepSchedule, "beta_start", 0.0),
    (TimestepSchedule, "beta_start", 1.0),
    (TimestepSchedule, "beta_end", 0.0001),
    (TimestepSchedule, "beta_end", 1.0),
    (TimestepSchedule, "beta_schedule", "cosine"),
    *[(c, "sigma_data", value) for c in (EDMPreconditioning, EDMWeighting, ScaledLogNormal) for value in (0.0, nan)],
    *[(c, "sigma_data", -1.0) for c in (MinSNRWeighting, SoftMinSNRWeighting, TruncatedSNRWeighting)],
    *[(c, name, 0.0) for c in (VPPreconditioning, VPNoise, VPTrajectory) for name in ("beta_d", "beta_min")],
    *[
        (c, name, 0)
        for c in (IDDPMPreconditioning, IDDPMNoise, IDDPMTrajectory)
        for name in ("c1", "c2", "num_timesteps")
    ],
    (VPPreconditioning, "num_timesteps", 0),
    *[(VPNoise, "epsilon_t", value) for value in (0.0, 1.0)],
    *[(VPTrajectory, "epsilon_s", value) for value in (0.0, 1.0)],
    (IDDPMTrajectory, "j0", 1000),
    *[(LogNormal, "p_mean", value) for value in (nan, inf, -inf)],
    (LogNormal, "p_std", 0.0),
    *[(c, "sigma_min", -1.0) for c in (LogNormal, ScaledLogNormal)],
    *[(c, "sigma_min", 0.0) for c in (LogUniform, UniformKarras, VETrajectory, EDMTrajectory)],
    *[(c, "sigma_max", 0.0) for c in (LogNormal, ScaledLogNormal)],
    *[(c, "sigma_max", inf) for c in (LogUniform, UniformKarras, VETrajectory, EDMTrajectory)],
    *[(c, "sigma_max", 0.001) for c in (LogUniform, UniformKarras, VETrajectory, EDMTrajectory)],
    *[(c, "rho", 0.0) for c in (UniformKarras, EDMTrajectory)],
    *[(c, name, 0) for c in (EulerSampler, HeunSampler, DPMSolverSampler) for name in ("num_steps", "rho")],
    *[(HeunSampler, "s_churn", value) for value in (-1.0, inf)],
    (HeunSampler, "s_tmax", -1.0),
    (HeunSampler, "s_noise", 0.0),
    (MinSNRWeighting, "gamma", 0.0),
    (LearnedWeighting, "num_features", 0),
    (AdaptiveNoise, "num_bins", 0),
    (AdaptiveNoise, "decay", 1.0),
    (AdaptiveNoise, "floor", 0.0),
    (AdaptiveNoise, "floor", 1.1),
]


@pytest.mark.parametrize("part", PARTS)
def test_parts_are_values(part: type) -> None:
    one, other = part(), part()
    assert one == other == pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == dataclasses.replace(one)
    assert len({one, other}) == 1
    for field in dataclasses.fields(part):
        with pytest.raises(FrozenInstanceError):
            setattr(one, field.name, None)


def test_parts_differ_by_their_fields() -> None:
    assert LogNormal(p_mean=0.0) != LogNormal()
    assert EDMLoss(noise=LogNormal(p_mean=0.0)) != EDMLoss()


@pytest.mark.parametrize("part", CLASSES)
def test_yaml_builds_a_part_by_its_short_name_and_dumps_it(part: type) -> None:
    base = next(base for base in BASES if issubclass(part, base))
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=base)
    config = parser.parse_args([f"--part={part.__name__}"])
    again = parser.parse_string(parser.dump(config))
    built = parser.instantiate(again).part
    assert type(built) is part
    assert not is_dataclass(part) or built == part()


def test_yaml_nests_parts_and_overrides_fields() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=DiffusionLoss)
    arguments = ["--loss=EDMLoss", "--loss.noise=Stratified", "--loss.noise.noise=ScaledLogNormal"]
    config = parser.parse_args([*arguments, "--loss.noise.noise.sigma_data=0.7", "--loss.weighting=UnitWeighting"])
    expected = EDMLoss(edm.Stratified(ScaledLogNormal(0.7)), edm.UnitWeighting())
    assert parser.instantiate(parser.parse_string(parser.dump(config))).loss == expected


def test_yaml_cannot_silently_give_a_part_the_range_of_the_one_it_replaces() -> None:
    """When jsonargparse swaps a class it keeps the fields of the same name: here LogNormal's bounds, 0 and infinity."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=DiffusionLoss, default=EDMLoss())
    for noise in ("LogUniform", "UniformKarras"):
        with pytest.raises(ValueError, match=rf"{noise}\.sigma_min must be positive and finite, got 0\.0"):
            parser.instantiate(parser.parse_args([f"--loss.noise={noise}", "--loss.noise.sigma_max=80"]))


@pytest.mark.parametrize(("part", "name", "value"), WRONG)
def test_a_wrong_field_is_refused_by_name(part: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{part.__name__}\.{name} must be .*, got {re.escape(repr(value))}"):
        part(**{name: value})


def test_defaults_are_those_of_the_papers() -> None:
    sdxl = TimestepSchedule(1000, 0.00085, 0.012, "scaled_linear", False)
    assert TimestepSchedule() == sdxl
    assert EDMPreconditioning() == EDMPreconditioning(0.5)
    assert edm.EpsPreconditioning() == edm.EpsPreconditioning(sdxl)
    assert edm.VelocityPreconditioning() == edm.VelocityPreconditioning(sdxl)
    assert VPPreconditioning() == VPPreconditioning(19.9, 0.1, 1000)
    assert IDDPMPreconditioning() == IDDPMPreconditioning(0.001, 0.008, 1000)
    assert LogNormal() == LogNormal(-1.2, 1.2, 0.0, inf)
    assert ScaledLogNormal() == ScaledLogNormal(1.0, 0.0, inf)
    assert edm.MatchedLogNormal() == edm.MatchedLogNormal(sdxl)
    assert edm.UniformTimesteps() == edm.UniformTimesteps(sdxl)
    assert LogUniform() == LogUniform(0.02, 100.0)
    assert UniformKarras() == UniformKarras(0.002, 80.0, 7.0)
    assert VPNoise() == VPNoise(19.9, 0.1, 1e-5)
    assert IDDPMNoise() == IDDPMNoise(0.001, 0.008, 1000)
    assert edm.Stratified() == edm.Stratified(LogNormal())
    assert EDMWeighting() == EDMWeighting(0.5)
    assert MinSNRWeighting() == MinSNRWeighting(5.0, 1.0)
    assert SoftMinSNRWeighting() == SoftMinSNRWeighting(1.0)
    assert TruncatedSNRWeighting() == TruncatedSNRWeighting(1.0)
    assert EDMLoss() == EDMLoss(LogNormal(), EDMWeighting())
    assert VPTrajectory() == VPTrajectory(19.9, 0.1, 1e-3)
    assert VETrajectory() == VETrajectory(0.02, 100.0)
    assert IDDPMTrajectory() == IDDPMTrajectory(0.001, 0.008, 1000, 8)
    assert EDMTrajectory() == EDMTrajectory(0.002, 80.0, 7.0)
    assert EulerSampler() == EulerSampler(50, 7.0)
    assert HeunSampler() == HeunSampler(20, 7.0, 0.0, 0.0, inf, 1.0)
    assert DPMSolverSampler() == DPMSolverSampler(50, 7.0)


def test_the_least_and_the_greatest_allowed_are_allowed() -> None:
    assert len(TimestepSchedule(num_timesteps=2, beta_start=0.01, beta_end=0.01).sigmas()) == 2
    assert IDDPMTrajectory(j0=0).time_steps(3)[0] > IDDPMTrajectory(j0=999).time_steps(3)[0] > 0
    assert AdaptiveNoise(num_bins=1, decay=0.0, floor=1.0).probabilities().tolist() == [1.0]
    assert LearnedWeighting(num_features=1).num_features == 1


def test_every_field_is_documented() -> None:
    for part in CLASSES:
        for name in inspect.signature(part).parameters:
            assert re.search(rf"^ +{name}: \w", part.__doc__ or "", re.MULTILINE), (part, name)


def test_parts_with_a_fixed_sigma_data_say_so() -> None:
    assert EDMPreconditioning(0.7).sigma_data == LearnedWeighting(EDMWeighting(0.7)).sigma_data == 0.7
    assert edm.EpsPreconditioning().sigma_data == edm.VelocityPreconditioning().sigma_data == 1.0
    assert not hasattr(edm.SNRWeighting(), "sigma_data")
    assert not hasattr(LearnedWeighting(edm.SNRWeighting()), "sigma_data")


def test_the_package_exports_what_it_imports() -> None:
    public = {name for name, value in vars(edm).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert public == set(edm.__all__)


def test_inverse_transforms_can_all_be_stratified_and_adapted() -> None:
    for part in CLASSES:
        if issubclass(part, InverseTransform):
            assert edm.Stratified(part()).noise == AdaptiveNoise(part(), num_bins=10).noise == part()
