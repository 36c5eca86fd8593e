"""Writes the files users carry away."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_edm.callbacks.ema import averaged
from lit_edm.callbacks.run_settings import run_settings
from lit_edm.callbacks.validation_images import ValidationImages
from lit_edm.errors import InputError
from lit_edm.files import NoRoomError, write_whole
from lit_edm.modules import SDXLModule
from lit_edm.modules.sharding import gathered
from lit_edm.sdxl.card import AdapterFolder
from lit_edm.sdxl.export import Format, export
from lit_edm.sdxl.formats import LORA_FILE, Precision
from lit_edm.sdxl.hub import HubRepository, first_sentence
from lit_edm.sdxl.licences import licence_of
from lit_edm.sdxl.updates import NETWORKS


class SaveAdapter(Callback):
    """Exports what is trained, averaged if it is, at the end and with each checkpoint.

    The end of the run writes adapter/ in the run's folder, a checkpoint at step n writes adapter/step_<n>/. Each holds
    the adapters (LoRA, DoRA, LoCon: pytorch_lora_weights.safetensors; LoHa, LoKr: <name>_lycoris.safetensors;
    FullFinetune: a folder for each network), <name>_emb.safetensors (clip_l and clip_g), the run's config and a model
    card (README.md) with the trigger words, sample pictures of ValidationImages, and code that loads it all in
    diffusers.

    At the end adapter/ can be sent to the Hugging Face Hub, with the config and the names in it, without step_<n>/.
    The token is the one of `hf auth login` or HF_TOKEN. A failed upload costs nothing but the upload.

    Args:
        name: Stem of the names of files.
        push_to_hub: Repository to send adapter/ to, such as someone/my_style; nowhere if not given.
        private: Whether nobody else sees that repository, should it have to be made.
        licence: Licence that the card names, an identifier of the Hub's list; the base's, where it is known.
        formats: Layouts of the adapter: diffusers, kohya (<name>.safetensors, for ComfyUI, Forge and AUTOMATIC1111),
            bundled (<name>_bundled.safetensors, the same with the new tokens in it); diffusers if not given.
        precision: Of all weights in the files.

    Raises:
        InputError: The name is none of a file, or push_to_hub none of a repository.
    """

    folder: Path

    def __init__(
        self,
        name: str = "lit_edm",
        push_to_hub: str | None = None,
        private: bool = True,
        licence: str | None = None,
        formats: list[Format] | None = None,
        precision: Precision = "float32",
    ) -> None:
        if not name or Path(name).name != name:
            raise InputError(f"SaveAdapter.name is '{name}'; it is the stem of file names, such as my_style")
        self.name = name
        self.repository = HubRepository(push_to_hub, private) if push_to_hub is not None else None
        self.licence = licence
        self.formats: list[Format] = formats or ["diffusers"]
        self.precision: Precision = precision

    def setup(self, trainer: Trainer, pl_module: SDXLModule, stage: str) -> None:
        """Makes sure before training that the Hub will take the files.

        Raises:
            InputError: The user is not logged in, the repository is someone else's, or the licence is not known.
        """
        if self.repository is None or stage != "fit" or not trainer.is_global_zero:
            return
        base = pl_module.checkpoint.pretrained
        if licence_of(base, self.licence) is None:
            raise InputError(
                f"SaveAdapter.licence: the licence of {base} is not known, and what is published needs one; write an "
                "identifier such as openrail++ (https://huggingface.co/docs/hub/repositories-licenses)"
            )
        self.repository = replace(self.repository, name=self.repository.full_name())

    def on_fit_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        """Asks for the run's folder where all processes do, for log_dir is a collective call."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "adapter"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: SDXLModule, checkpoint: dict[str, Any]) -> None:
        """Writes what the checkpoint holds, for other programs; if there is no room, warns: the checkpoint matters."""
        if trainer.state.fn != TrainerFn.FITTING:  # in validation, too
            return
        with averaged(trainer, pl_module), gathered(pl_module):
            try:
                if trainer.is_global_zero:
                    self.write(trainer, pl_module, self.folder / f"step_{trainer.global_step:06d}")
            except NoRoomError as error:
                rank_zero_warn(f"SaveAdapter leaves out step {trainer.global_step}, and the run goes on: {error}")

    def on_fit_end(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        """Writes the result and tells where it is."""
        with averaged(trainer, pl_module), gathered(pl_module):
            if trainer.is_global_zero:
                self.tell(self.write_at_last(trainer, pl_module))
        if trainer.is_global_zero and self.repository is not None:
            self.upload(self.repository)

    def tell(self, described: AdapterFolder) -> None:
        """Tells where the result is, and how it is used."""
        written = [path for path in sorted(self.folder.iterdir()) if not path.name.startswith("step_")]
        files = "\n".join(f"  {path}" for path in written)
        rank_zero_info(f"\nThe adapter is ready:\n{files}\n{replace(described, repository=None).how_to_use()}\n")

    def write_at_last(self, trainer: Trainer, module: SDXLModule) -> AdapterFolder:
        """Writes the result.

        Raises:
            InputError: There is no room for it.
        """
        try:
            return self.write(trainer, module, self.folder, self.repository)
        except NoRoomError as error:
            raise InputError(f"{error}. scripts/export.py makes these files of the run's checkpoints") from error

    def upload(self, repository: HubRepository) -> None:
        """Sends the result to the Hub and tells where it is; if that fails, warns and tells how to do it by hand."""
        try:
            rank_zero_info(f"The adapter is on the Hub: {repository.upload(self.folder)}\n")
        except Exception as error:  # whatever it is, the run is done and its files are here
            rank_zero_warn(
                f"{self.folder} could not be sent to {repository.name} on the Hub ({first_sentence(error)}); "
                f"the files are complete, send them with\n  {repository.upload_command(self.folder)}"
            )

    def write(
        self, trainer: Trainer, module: SDXLModule, folder: Path, repository: HubRepository | None = None
    ) -> AdapterFolder:
        """Writes weights, embeddings, config, pictures and the card, for a repository if it is to be in one.

        What is written of weights is what the module has: all processes lend it the averages, and the whole of shards.

        Returns:
            What was written.
        """
        networks = module.networks()
        embeddings, tokens = module.conditioner.new_embeddings(), module.placeholders.counts
        exported = export(networks, folder, self.name, embeddings, tokens, self.formats, self.precision)
        prompts, pictures = self.copy_samples(trainer, module, folder)
        described = AdapterFolder(
            folder=folder,
            checkpoint=module.checkpoint,
            exported=exported,
            tokens=module.placeholders.tokens,
            pool_at_end=module.pool_at_end,
            clip_skip=module.clip_skip,
            embeddings=f"{self.name}_emb.safetensors",
            prompts=prompts,
            pictures=pictures,
            config=self.copy_config(folder),
            title=self.name,
            repository=repository and repository.name,
            licence=self.licence,
            settings=run_settings(trainer, module),
        )
        write_whole(folder / "README.md", lambda part: part.write_text(described.card(), encoding="utf-8"))
        self.remove_others(folder, {*described.files(), *pictures})
        return described

    def remove_others(self, folder: Path, written: set[str]) -> None:
        """Removes what a run of other settings left in the same folder under the names of this callback's files."""
        stems = ("_emb", "_lycoris", "_bundled", "")
        names = {LORA_FILE, *(f"{self.name}{stem}.safetensors" for stem in stems), *(f"{net}/" for net in NETWORKS)}
        names |= {path.name for path in folder.glob("sample_[0-9][0-9].png")}
        for path in (folder / name for name in names - written):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def copy_config(self, folder: Path) -> str:
        """Copies the config that the command line saved beside the logs; returns it, empty if there is none."""
        source = self.folder.parent / "config.yaml"
        if not source.exists():
            return ""
        write_whole(folder / source.name, lambda part: shutil.copyfile(source, part))
        return source.read_text(encoding="utf-8")

    def copy_samples(self, trainer: Trainer, module: SDXLModule, folder: Path) -> tuple[list[str], list[str]]:
        """Copies the newest pictures of ValidationImages; returns their prompts and names, empty without it."""
        prompts: list[str] = []
        pictures: list[str] = []
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ValidationImages):
                prompts += [module.placeholders.replace(prompt) for prompt in callback.prompts]
                for path in callback.pictures:
                    pictures.append(f"sample_{len(pictures):02d}.png")
                    write_whole(folder / pictures[-1], lambda part, path=path: shutil.copyfile(path, part))
        return prompts, pictures
