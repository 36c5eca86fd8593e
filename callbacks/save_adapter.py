"""Writes the files users carry away."""

import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_edm.callbacks.ema import averaged
from lit_edm.callbacks.validation_images import ValidationImages
from lit_edm.errors import InputError
from lit_edm.files import write_whole
from lit_edm.modules import SDXLModule
from lit_edm.sdxl.card import AdapterFolder
from lit_edm.sdxl.export import export, save_embeddings


class SaveAdapter(Callback):
    """Exports what is trained, averaged if it is, at the end and with each checkpoint.

    The end of the run writes adapter/ in the run's folder, a checkpoint at step n writes adapter/step_<n>/. Each holds
    the adapters (LoRA, DoRA, LoCon: pytorch_lora_weights.safetensors; LoHa, LoKr: <name>_lycoris.safetensors;
    FullFinetune: a folder for each network), <name>_emb.safetensors (clip_l and clip_g), the run's config and a model
    card (README.md) with the trigger words, sample pictures of ValidationImages, and code that loads it all in
    diffusers.

    Args:
        name: Stem of the names of files.

    Raises:
        InputError: The name is none of a file.
    """

    folder: Path

    def __init__(self, name: str = "lit_edm") -> None:
        if not name or Path(name).name != name:
            raise InputError(f"SaveAdapter.name is '{name}'; it is the stem of file names, such as my_style")
        self.name = name

    def on_fit_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        """Asks for the run's folder where all processes do, for log_dir is a collective call."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "adapter"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: SDXLModule, checkpoint: dict[str, Any]) -> None:
        """Writes what the checkpoint holds, for other programs."""
        if trainer.is_global_zero and trainer.training:
            self.write(trainer, pl_module, self.folder / f"step_{trainer.global_step:06d}")

    def on_fit_end(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        """Writes the result and tells where it is."""
        if trainer.is_global_zero:
            described = self.write(trainer, pl_module, self.folder)
            written = [path for path in sorted(self.folder.iterdir()) if not path.name.startswith("step_")]
            files = "\n".join(f"  {path}" for path in written)
            rank_zero_info(f"\nThe adapter is ready:\n{files}\n{described.how_to_use()}\n")

    def write(self, trainer: Trainer, module: SDXLModule, folder: Path) -> AdapterFolder:
        """Writes weights, embeddings, config, pictures and the card, and returns their description."""
        first, second = module.conditioner.encoders
        networks = {"unet": module.denoiser.unet, "text_encoder": first, "text_encoder_2": second}
        with averaged(trainer, module):
            exported = export(networks, folder, self.name)
            if embeddings := module.conditioner.new_embeddings():
                save_embeddings(embeddings, folder / f"{self.name}_emb.safetensors")
        described = AdapterFolder(
            folder=folder,
            checkpoint=module.checkpoint,
            exported=exported,
            tokens=module.placeholders.tokens,
            pool_at_end=module.pool_at_end,
            clip_skip=module.clip_skip,
            embeddings=f"{self.name}_emb.safetensors",
            config=self.copy_config(folder),
            **self.copy_samples(trainer, module, folder),
        )
        write_whole(folder / "README.md", lambda part: part.write_text(described.card(), encoding="utf-8"))
        return described

    def copy_config(self, folder: Path) -> str:
        """Copies the config that the command line saved beside the logs; returns it, empty if there is none."""
        source = self.folder.parent / "config.yaml"
        if not source.exists():
            return ""
        write_whole(folder / source.name, lambda part: shutil.copyfile(source, part))
        return source.read_text(encoding="utf-8")

    def copy_samples(self, trainer: Trainer, module: SDXLModule, folder: Path) -> dict[str, list[str]]:
        """Copies the newest pictures of ValidationImages; returns their prompts and names, empty without it."""
        prompts: list[str] = []
        pictures: list[str] = []
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ValidationImages):
                prompts += [module.placeholders.replace(prompt) for prompt in callback.prompts]
                for path in callback.pictures:
                    pictures.append(f"sample_{len(pictures):02d}.png")
                    write_whole(folder / pictures[-1], lambda part, path=path: shutil.copyfile(path, part))
        return {"prompts": prompts, "pictures": pictures}
