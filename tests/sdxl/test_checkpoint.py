import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from lit_edm.edm import EDMPreconditioning, EpsPreconditioning, TimestepSchedule, VelocityPreconditioning
from lit_edm.errors import InputError
from lit_edm.sdxl import SDXLCheckpoint


def with_scheduler(base: Path, folder: Path, **changes: object) -> SDXLCheckpoint:
    """A copy of a base's configs whose scheduler's config says something else."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return SDXLCheckpoint(str(folder))


def test_kinds_are_told_apart(tiny: Path, tiny_v: Path, tiny_edm: Path) -> None:
    assert SDXLCheckpoint(str(tiny)).preconditioning() == EpsPreconditioning(TimestepSchedule())
    assert SDXLCheckpoint(str(tiny_v)).preconditioning() == VelocityPreconditioning(TimestepSchedule())
    assert SDXLCheckpoint(str(tiny_edm)).preconditioning() == EDMPreconditioning(0.5)


def test_sigma_ranges(tiny: Path, tiny_edm: Path) -> None:
    assert SDXLCheckpoint(str(tiny)).sigma_range() == pytest.approx((0.0291671582, 14.6146412293))
    assert SDXLCheckpoint(str(tiny_edm)).sigma_range() == (0.002, 80.0)


def test_every_number_of_the_config_is_read(tiny: Path, tiny_edm: Path, tmp_path: Path) -> None:
    changed = with_scheduler(
        tiny,
        tmp_path / "eps",
        beta_start=0.001,
        beta_end=0.02,
        beta_schedule="linear",
        num_train_timesteps=500,
        rescale_betas_zero_snr=True,
    )
    assert changed.preconditioning() == EpsPreconditioning(TimestepSchedule(500, 0.001, 0.02, "linear", True))
    changed = with_scheduler(tiny_edm, tmp_path / "edm", sigma_data=0.7, sigma_min=0.01, sigma_max=20.0)
    assert changed.preconditioning() == EDMPreconditioning(0.7)
    assert changed.sigma_range() == (0.01, 20.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type is sample"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is squaredcos_cap_v2"),
        ({"trained_betas": [0.1]}, "trained_betas"),
    ],
)
def test_unsupported_schedulers(tiny: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"scheduler_config.json: {message}"):
        with_scheduler(tiny, tmp_path / "base", **changes).preconditioning()


def test_missing_base(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "somebody/not-cached", str(tmp_path)):
        with pytest.raises(InputError, match=r"model\.init_args\.pretrained: cannot read .* of ") as caught:
            SDXLCheckpoint(name).preconditioning()
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"model\.init_args\.vae: cannot read config\.json of"):
        SDXLCheckpoint("x", vae=str(tmp_path)).vae_config()


def test_another_vae(tiny: Path, tiny_edm: Path) -> None:
    checkpoint = SDXLCheckpoint(str(tiny), vae=str(tiny_edm / "vae"))
    assert checkpoint.vae_config()["latents_std"] == [8.4, 7.3, 6.5, 5.2]
    assert checkpoint.base_vae_config()["latents_std"] is None
    theirs = AutoencoderKL.from_pretrained(tiny_edm, subfolder="vae")
    assert checkpoint.load_vae(torch.float32).state_dict().keys() == theirs.state_dict().keys()
    assert checkpoint.load_vae(torch.float32).config.scaling_factor == 0.5


def test_a_variant_is_loaded(tiny: Path, tmp_path: Path) -> None:
    for name in ("unet", "vae"):
        shutil.copytree(tiny / name, tmp_path / name)
        plain = tmp_path / name / "diffusion_pytorch_model.safetensors"
        plain.rename(plain.with_suffix(".fp16.safetensors"))
    checkpoint = SDXLCheckpoint(str(tmp_path), variant="fp16")
    assert checkpoint.load_unet(torch.bfloat16).conv_in.weight.dtype == torch.bfloat16
    assert checkpoint.load_vae(torch.float32).dtype == torch.float32
    with pytest.raises(
        InputError, match=r"unet holds config\.json, .*fp16.*, but no diffusion_pytorch_model\.safetensors;"
    ):
        SDXLCheckpoint(str(tmp_path)).load_unet(torch.float32)


def test_everything_loaded_is_frozen(tiny: Path) -> None:
    checkpoint = SDXLCheckpoint(str(tiny))
    networks = [
        checkpoint.load_unet(torch.float32),
        checkpoint.load_vae(torch.float32),
        *checkpoint.load_text_encoders(torch.float32),
    ]
    assert not any(parameter.requires_grad for network in networks for parameter in network.parameters())
