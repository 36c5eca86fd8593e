"""EDM: the design space of Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models".

Table 1 is the table of contents:

    Sampling: ODE solver, time steps            sampling.py, as parts samplers.py; other columns general_sampling.py
    Sampling: schedule, scaling                 general_sampling.py, schedule.py
    Network and preconditioning                 preconditioning.py
    Training: noise distribution                noise.py; drawn with less variance variance_reduction.py
    Training: loss weighting                    weighting.py

loss.py puts noise and weighting together (Eq. 2). A denoiser D(x; sigma) is all that losses and samplers know of a
network; guidance.py makes one out of two. This package depends on torch only.
"""

from lit_edm.edm.general_sampling import (
    EDMTrajectory,
    IDDPMTrajectory,
    Trajectory,
    VETrajectory,
    VPTrajectory,
    sample_trajectory,
)
from lit_edm.edm.guidance import guided
from lit_edm.edm.loss import Denoise, DiffusionLoss, EDMLoss, Target
from lit_edm.edm.noise import (
    IDDPMNoise,
    InverseTransform,
    LogNormal,
    LogUniform,
    MatchedLogNormal,
    NoiseDistribution,
    ScaledLogNormal,
    UniformKarras,
    UniformTimesteps,
    VPNoise,
)
from lit_edm.edm.preconditioning import (
    EDMPreconditioning,
    EpsPreconditioning,
    IDDPMPreconditioning,
    Preconditioning,
    Scalings,
    VelocityPreconditioning,
    VEPreconditioning,
    VPPreconditioning,
)
from lit_edm.edm.samplers import DPMSolverSampler, EulerSampler, HeunSampler, Sampler
from lit_edm.edm.sampling import karras_sigmas, sample_dpmpp_2m, sample_euler, sample_heun
from lit_edm.edm.schedule import TimestepSchedule
from lit_edm.edm.shapes import append_dims
from lit_edm.edm.variance_reduction import AdaptiveNoise, Stratified
from lit_edm.edm.weighting import (
    EDMWeighting,
    LearnedWeighting,
    LossWeighting,
    MinSNRWeighting,
    SNRWeighting,
    SoftMinSNRWeighting,
    TruncatedSNRWeighting,
    UnitWeighting,
)

__all__ = [
    "AdaptiveNoise",
    "DPMSolverSampler",
    "Denoise",
    "DiffusionLoss",
    "EDMLoss",
    "EDMPreconditioning",
    "EDMTrajectory",
    "EDMWeighting",
    "EpsPreconditioning",
    "EulerSampler",
    "HeunSampler",
    "IDDPMNoise",
    "IDDPMPreconditioning",
    "IDDPMTrajectory",
    "InverseTransform",
    "LearnedWeighting",
    "LogNormal",
    "LogUniform",
    "LossWeighting",
    "MatchedLogNormal",
    "MinSNRWeighting",
    "NoiseDistribution",
    "Preconditioning",
    "SNRWeighting",
    "Sampler",
    "ScaledLogNormal",
    "Scalings",
    "SoftMinSNRWeighting",
    "Stratified",
    "Target",
    "TimestepSchedule",
    "Trajectory",
    "TruncatedSNRWeighting",
    "UniformKarras",
    "UniformTimesteps",
    "UnitWeighting",
    "VEPreconditioning",
    "VETrajectory",
    "VPNoise",
    "VPPreconditioning",
    "VPTrajectory",
    "VelocityPreconditioning",
    "append_dims",
    "guided",
    "karras_sigmas",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_heun",
    "sample_trajectory",
]
