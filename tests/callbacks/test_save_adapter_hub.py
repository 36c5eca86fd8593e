"""SaveAdapter's push_to_hub, by a stand-in of the Hub's client: nothing is sent anywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_edm.callbacks import SaveAdapter
from lit_edm.data import CaptionedImagesDataModule
from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule
from lit_edm.sdxl import LoRA


@pytest.fixture
def fit(tiny: Path, icons: Path, trainer: Callable[..., Trainer]) -> Callable[..., None]:
    """Trains one step with some callbacks."""

    def run(*callbacks: Any) -> None:
        module = SDXLModule(str(tiny), tokens={"TOK": 1}, adapter=LoRA(rank=2))
        settings = {"enable_checkpointing": len(callbacks) > 1, "max_steps": 1}
        trainer(*callbacks, **settings).fit(module, CaptionedImagesDataModule(icons, resolution=16, batch_size=2))

    return run


def test_sends_the_result_and_a_card_that_loads_it(
    fit: Callable[..., None], hub: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "config.yaml").write_text("seed_everything: 0\n")
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1)
    fit(SaveAdapter("mine", push_to_hub="icons", licence="openrail++"), checkpoints)
    assert hub.made == {"someone/icons": {"private": True, "exist_ok": True}}
    sent, local = hub.folder("someone/icons"), tmp_path / "adapter"
    names = {"pytorch_lora_weights.safetensors", "mine_emb.safetensors", "README.md", "config.yaml"}
    assert {path.name for path in sent.iterdir()} == names
    assert {path.name for path in local.iterdir()} == names | {"step_000001"}
    assert all((sent / name).read_bytes() == (local / name).read_bytes() for name in names)
    card = ModelCard.load(sent / "README.md")
    assert card.data.to_dict()["license"] == "openrail++"
    assert "# mine\n" in card.text
    assert "| optimizer steps | 1 |" in card.text
    assert "lit-edm fit --config config.yaml" in card.text
    told = [message.strip() for message in caplog.messages if "adapter is" in message]
    assert str(local) in told[0]
    assert "someone/icons" not in told[0]
    assert told[1:] == ["The adapter is on the Hub: https://hub.test/someone/icons"]
    code = card.text.split("```python\n")[1].split("\n```")[0]
    assert str(local) not in code
    loaded: dict[str, Any] = {}
    exec(code.rsplit("\n", 1)[0], loaded)
    assert loaded["pipe"].get_active_adapters()
    assert "someone/icons" not in (local / "step_000001/README.md").read_text()


def test_a_failed_upload_costs_nothing_else(
    fit: Callable[..., None], hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**settings: Any) -> None:
        raise ConnectionError("the line is dead. So much\nfor it")

    monkeypatch.setattr(hub, "upload_folder", fail)
    with pytest.warns(UserWarning, match=r"could not be sent to someone/icons on the Hub \(the line is dead\)") as said:
        fit(SaveAdapter(push_to_hub="someone/icons", private=False, licence="mit"))
    command = f"hf upload someone/icons {tmp_path / 'adapter'} . --exclude 'step_*/*'"
    assert [str(warning.message) for warning in said][-1].endswith(f"send them with\n  {command}")
    assert (tmp_path / "adapter/README.md").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"push_to_hub": "other/icons", "licence": "mit"}, "you are someone; write someone/icons"),
        ({"push_to_hub": "icons"}, r"SaveAdapter\.licence: the licence of .* is not known"),
    ],
)
def test_what_is_wrong_is_said_before_training(
    fit: Callable[..., None], hub: Any, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        fit(SaveAdapter(**settings))
    assert not hub.made
    assert not (tmp_path / "adapter").exists()


def test_who_is_not_logged_in_hears_it_before_training(fit: Callable[..., None], tmp_path: Path) -> None:
    """By the Hub's own client, which is offline here."""
    with pytest.raises(InputError, match="the Hub does not know you"):
        fit(SaveAdapter(push_to_hub="someone/icons", licence="mit"))
    assert not (tmp_path / "adapter").exists()


def test_without_it_the_hub_is_left_alone(fit: Callable[..., None], hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "whoami", None)
    fit(SaveAdapter())
    assert not hub.made


def test_a_wrong_name_is_refused_at_once() -> None:
    with pytest.raises(InputError, match=r"^SaveAdapter\.push_to_hub is 'a/b/c', which no"):
        SaveAdapter(push_to_hub="a/b/c")
