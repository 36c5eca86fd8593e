from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lit_edm.data import CaptionedImagesDataModule
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.sdxl import DoRA, FromFile, LoHa, LoKr, LoRA, SDXLCheckpoint
from lit_edm.sdxl.formats import write_kohya
from lit_edm.sdxl.injection import weights_of
from lit_edm.sdxl.low_rank import updated_layers
from lit_edm.sdxl.updates import AdapterWeights


def trained(tiny: Path, adapter: Any) -> AdapterWeights:
    """What an adapter has learned of all networks, far from where it started."""
    checkpoint = SDXLCheckpoint(str(tiny))
    first, second = checkpoint.load_text_encoders(torch.float32)
    networks: dict[str, nn.Module] = {"unet": checkpoint.load_unet(torch.float32)}
    networks |= {"text_encoder": first, "text_encoder_2": second}
    for network in networks.values():
        adapter(network)
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0
    return weights_of(networks)


@pytest.mark.parametrize("adapter", [LoRA(rank=3, alpha=6.0), DoRA(rank=2), LoHa(rank=2), LoKr(rank=2)], ids=str)
def test_goes_on_from_a_file_and_resumes(
    tiny: Path, icons: Path, tmp_path: Path, trainer: Callable[..., Trainer], adapter: Any
) -> None:
    weights = trained(tiny, adapter)
    file = FromFile(str(write_kohya(weights, tmp_path / "x.safetensors")))
    settings: dict[str, Any] = {"adapter": file, "text_encoder_adapter": file}

    def module() -> SDXLModule:
        return SDXLModule(str(tiny), **settings)

    def fit(module: SDXLModule, steps: int, **more: Any) -> SDXLModule:
        trainer(max_steps=steps).fit(module, CaptionedImagesDataModule(icons, resolution=16, batch_size=2), **more)
        return module

    fresh = module()
    fresh.configure_model()
    assert largest_difference(weights, fresh) < 1e-6
    done = fit(module(), 3)
    assert largest_difference(weights, done) > 1e-4
    done.trainer.save_checkpoint(tmp_path / "done.ckpt")
    resumed = fit(module(), 3, ckpt_path=str(tmp_path / "done.ckpt"))  # and there is nothing left to do
    assert largest_difference(weights_of(networks_of(done)), resumed) == 0


def networks_of(module: SDXLModule) -> dict[str, nn.Module]:
    first, second = module.conditioner.encoders
    return {"unet": module.denoiser.unet, "text_encoder": first, "text_encoder_2": second}


def largest_difference(weights: AdapterWeights, module: SDXLModule) -> float:
    found = weights_of(networks_of(module)).networks
    assert {name: set(layers) for name, layers in found.items()} == {n: set(ls) for n, ls in weights.networks.items()}
    return max(
        (found[network][layer].product() - update.product()).abs().max().item()
        for network, layers in weights.networks.items()
        for layer, update in layers.items()
    )


def test_layers_to_leave_compute_but_are_not_trained(tiny: Path, tmp_path: Path) -> None:
    weights = trained(tiny, LoRA(rank=2))
    adapter = FromFile(str(write_kohya(weights, tmp_path / "x.safetensors")))
    encoder, _ = SDXLCheckpoint(str(tiny)).load_text_encoders(torch.float32)
    adapter(encoder, without=("text_model.encoder.layers.1",))
    assert len(updated_layers(encoder)) == len(weights.networks["text_encoder"])
    learns = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in learns} == {"0"}
    assert len(learns) == len(weights.networks["text_encoder"])


def test_can_be_left_out(tiny: Path, tmp_path: Path) -> None:
    adapter = FromFile(str(write_kohya(trained(tiny, LoRA(rank=2)), tmp_path / "x.safetensors")))
    encoder, _ = SDXLCheckpoint(str(tiny)).load_text_encoders(torch.float32)
    ids = torch.arange(7)[None]
    before = encoder(ids).last_hidden_state
    adapter(encoder)
    with adapter.disabled(encoder):
        assert encoder(ids).last_hidden_state.equal(before)
    assert not encoder(ids).last_hidden_state.equal(before)


def test_a_file_of_one_text_encoder_serves_both(tiny: Path, tmp_path: Path) -> None:
    weights = AdapterWeights({"text_encoder": trained(tiny, LoRA(rank=2)).networks["text_encoder"]})
    adapter = FromFile(str(write_kohya(weights, tmp_path / "x.safetensors")))
    first, second = SDXLCheckpoint(str(tiny)).load_text_encoders(torch.float32)
    for encoder in (first, second):
        adapter(encoder)
    assert updated_layers(first)
    assert not updated_layers(second)


def test_says_which_key_names_the_wrong_file(tiny: Path, tmp_path: Path) -> None:
    weights = AdapterWeights({"text_encoder": trained(tiny, LoRA(rank=2)).networks["text_encoder"]})
    path = write_kohya(weights, tmp_path / "x.safetensors")
    unet = SDXLCheckpoint(str(tiny)).load_unet(torch.float32)
    with pytest.raises(
        InputError, match=r"model\.init_args\.adapter\.init_args\.path: .* has updates of text_encoder, "
    ):
        FromFile(str(path))(unet)
    with pytest.raises(InputError, match="updates of text_encoder, not of unet; write null"):
        FromFile(str(path)).check(unet)
    with pytest.raises(InputError, match="there is no such file"):
        FromFile(str(tmp_path / "y.safetensors"))(unet)
