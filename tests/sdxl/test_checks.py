import json
import shutil
from pathlib import Path

import pytest

from lit_edm.edm import (
    EDMLoss,
    EDMPreconditioning,
    EDMWeighting,
    EpsPreconditioning,
    IDDPMNoise,
    LogNormal,
    MinSNRWeighting,
    NoiseDistribution,
    Preconditioning,
    Scalings,
    SNRWeighting,
    Stratified,
    TimestepSchedule,
    UniformTimesteps,
    VelocityPreconditioning,
    VPNoise,
)
from lit_edm.errors import InputError
from lit_edm.sdxl import SDXLCheckpoint
from lit_edm.sdxl.checks import (
    check_initializers,
    check_loss,
    check_preconditioning,
    check_sizes,
    latent_statistics_differ,
)

EPS, EDM = EpsPreconditioning(), EDMPreconditioning(0.5)
TABLE, KARRAS = (0.0291671582, 14.6146412293), (0.002, 80.0)


class Foreign(Preconditioning):
    """Somebody's own."""

    sigma_data = 1.0

    def __call__(self, sigma) -> Scalings:
        return EPS(sigma)


@pytest.mark.parametrize("base", [EPS, EDM, VelocityPreconditioning()])
def test_the_bases_own_preconditioning_passes(base: Preconditioning) -> None:
    check_preconditioning(base, base)
    check_preconditioning(Foreign(), base)


@pytest.mark.parametrize(
    ("given", "base"),
    [(EDM, EPS), (EPS, EDM), (VelocityPreconditioning(), EPS), (EDMPreconditioning(1.0), EDM)],
)
def test_another_preconditioning_is_refused(given: Preconditioning, base: Preconditioning) -> None:
    with pytest.raises(InputError, match=r"model\.init_args\.preconditioning is .* remove the line"):
        check_preconditioning(given, base)


@pytest.mark.parametrize(
    ("loss", "base", "sigma_range"),
    [
        (EDMLoss(UniformTimesteps(), SNRWeighting()), EPS, TABLE),
        (EDMLoss(UniformTimesteps(), MinSNRWeighting(5.0, sigma_data=1.0)), EPS, TABLE),
        (EDMLoss(LogNormal(0.483, 1.194, 0.0292, 14.61), EDMWeighting(1.0)), EPS, TABLE),
        (EDMLoss(LogNormal(), EDMWeighting(0.5)), EDM, KARRAS),
        (EDMLoss(LogNormal(), MinSNRWeighting(5.0, sigma_data=0.5)), EDM, KARRAS),
        (EDMLoss(UniformTimesteps(), MinSNRWeighting(5.0, 1.0)), VelocityPreconditioning(), TABLE),
    ],
)
def test_right_combinations_pass(loss: EDMLoss, base: Preconditioning, sigma_range: tuple[float, float]) -> None:
    check_loss(loss, base, sigma_range)


@pytest.mark.parametrize(
    ("loss", "base", "sigma_range", "message"),
    [
        (EDMLoss(UniformTimesteps(), EDMWeighting(0.5)), EPS, TABLE, r"weighting.*sigma_data is 0\.5.*write 1\.0"),
        (EDMLoss(LogNormal(), MinSNRWeighting()), EDM, KARRAS, r"weighting.*sigma_data is 1\.0.*write 0\.5"),
        (
            EDMLoss(Stratified(UniformTimesteps()), EDMWeighting(0.5)),
            EDM,
            KARRAS,
            r"noise\.init_args\.noise is UniformTimesteps",
        ),
        (EDMLoss(UniformTimesteps(), EDMWeighting(0.5)), EDM, KARRAS, "noise is UniformTimesteps.*has no timesteps"),
        (
            EDMLoss(UniformTimesteps(TimestepSchedule(beta_end=0.02)), SNRWeighting()),
            EPS,
            TABLE,
            r"noise\.init_args\.schedule",
        ),
        (
            EDMLoss(LogNormal(), SNRWeighting()),
            EPS,
            TABLE,
            r"noise draws sigma in \[0, inf\].*sigma_min: 0\.0292.*14\.61",
        ),
    ],
)
def test_wrong_combinations_name_the_line(
    loss: EDMLoss, base: Preconditioning, sigma_range: tuple[float, float], message: str
) -> None:
    with pytest.raises(InputError, match=r"^model\.init_args\.loss\.init_args\." + message):
        check_loss(loss, base, sigma_range)


def test_the_advice_on_the_range_is_right() -> None:
    check_loss(EDMLoss(LogNormal(sigma_min=0.0292, sigma_max=14.61), SNRWeighting()), EPS, TABLE)


def test_sizes_must_divide_by_the_vaes_factor(tiny: Path) -> None:
    checkpoint = SDXLCheckpoint(str(tiny))
    check_sizes([(64, 64), (32, 96)], checkpoint)
    with pytest.raises(
        InputError, match=r"images of 63 px a side .* multiple of 2, .* choose a resolution of 62 or 64"
    ):
        check_sizes([(64, 64), (64, 63)], checkpoint)


def test_words_that_tokens_start_from(tiny: Path) -> None:
    tokenizer, _ = SDXLCheckpoint(str(tiny)).load_tokenizers()
    pieces = len(tokenizer("icon", add_special_tokens=False).input_ids)
    assert check_initializers({"TOK": "icon"}, {"TOK": pieces}, tokenizer) == []
    (line,) = check_initializers({"TOK": "icon"}, {"TOK": pieces - 1}, tokenizer)
    assert f"is {pieces} tokens of the vocabulary, of which the first {pieces - 1} are taken" in line
    with pytest.raises(InputError, match=r"initializers: ' ' of TOK has no token; write a word"):
        check_initializers({"TOK": " "}, {"TOK": 1}, tokenizer)


def test_vaes_that_normalise_differently(tiny: Path, tiny_edm: Path, tmp_path: Path) -> None:
    assert not latent_statistics_differ(SDXLCheckpoint(str(tiny_edm)))
    assert latent_statistics_differ(SDXLCheckpoint(str(tiny_edm), vae=str(tiny / "vae")))
    shutil.copytree(tiny / "vae", tmp_path / "vae")
    assert not latent_statistics_differ(SDXLCheckpoint(str(tiny), vae=str(tmp_path / "vae")))
    config = json.loads((tmp_path / "vae/config.json").read_text()) | {"scaling_factor": 1.0}
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    assert latent_statistics_differ(SDXLCheckpoint(str(tiny), vae=str(tmp_path / "vae")))


@pytest.mark.parametrize("noise", [VPNoise(), IDDPMNoise()])
def test_laws_of_other_columns_draw_what_sdxl_does_not_know(noise: NoiseDistribution) -> None:
    with pytest.raises(InputError, match=r"noise draws sigma in \[.*\], but the base is epsilon-predicting and knows"):
        check_loss(EDMLoss(noise, SNRWeighting()), EPS, TABLE)
