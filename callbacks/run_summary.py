"""What a run is going to do, told and checked before anything slow."""

from pathlib import Path
from textwrap import wrap

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_edm.callbacks import run_facts, run_files
from lit_edm.callbacks.disk_room import Files, Room, check_room, standing
from lit_edm.callbacks.run_length import RunLength, run_length
from lit_edm.callbacks.run_memory import too_large, training_memory
from lit_edm.errors import InputError
from lit_edm.files import readable, write_whole
from lit_edm.sdxl.memory import TrainingMemory

WIDTH = 110


class RunSummary(Callback):
    """Tells what a run is going to do before it does anything slow, and refuses one that its disk has no room for.

    Images and their sizes, steps, what is trained when and by what, what will be kept and written where, and the
    memory that training takes are shown in some fifteen lines, and written to summary.txt in the run's folder. Images
    are counted if the data module has lit_edm.batch.SummarizesImages; memory is that of SDXLModule and EDMModule.

    Raises:
        InputError: A folder cannot be written to, or there is no room for what the run would write to it.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes sure that checkpoints can be written, before weights are loaded."""
        for keeper in run_files.keepers(trainer) if stage == "fit" else []:
            standing(Path(str(keeper.dirpath)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells, on the first process; all end if it finds that the run cannot."""
        folder, length = Path(trainer.log_dir or trainer.default_root_dir), run_length(trainer)  # collective calls
        mistake = None
        if trainer.is_global_zero:
            try:
                text = self.summary(trainer, pl_module, folder, length)
                write_whole(folder / "summary.txt", lambda part: part.write_text(text, encoding="utf-8"))
                rank_zero_info(f"\n{text}")
            except InputError as error:
                mistake = str(error)
        if (mistake := trainer.strategy.broadcast(mistake)) is not None:
            raise InputError(mistake)

    def summary(self, trainer: Trainer, module: LightningModule, folder: Path, length: RunLength) -> str:
        """Returns the summary of a run.

        Args:
            trainer: Set up to train.
            module: Its networks are loaded.
            folder: Of the run.
            length: How long it is.

        Raises:
            InputError: A folder cannot be written to, or its disk has no room.
        """
        data, memory = getattr(trainer, "datamodule", None), training_memory(trainer, module)
        kept = [*run_files.caches(trainer, module), *run_files.class_images(data)]
        written = [
            *run_files.checkpoints(trainer, length, memory),
            *run_files.adapters(trainer, module, folder, length),
            *run_files.pictures(trainer, folder, length),
        ]
        rooms = check_room([*kept, *written])
        for room in rooms:
            if room.free < 2 * room.needed:
                rank_zero_warn(f"{room.folder}: {told_of_room(room)}; other programs may take what is left")
        facts = {
            "images": [run_facts.images_of(trainer)],
            "sizes": [run_facts.sizes_of(trainer)],
            "steps": [run_facts.steps_of(trainer, length)],
            "trained": [run_facts.trained_by(module)],
            "optimizer": [run_facts.optimized_by(trainer)],
            "phases": [run_facts.phases(trainer, module, length.steps)],
            "saved": [run_facts.kept_when(trainer)],
            "caches": [told_of_files(files) for files in kept],
            "written": [told_of_files(files) for files in written],
            "disk": [f"{told_of_room(room)} ({room.folder})" for room in rooms],
            "memory": [told_of_memory(memory, module, data)],
        }
        return laid_out(f"{type(module).__name__} in {folder}", facts)


def told_of_files(files: Files) -> str:
    """Tells what is written, how much of it, and where."""
    note = f", {files.note}" if files.note else ""
    where = "in memory" if files.folder is None else f"in {files.folder}"
    return f"{files.what}{note}, {readable(files.size)} {where}"


def told_of_room(room: Room) -> str:
    """Tells what is needed on a disk, and what is free there."""
    return f"about {readable(room.needed)} of {readable(room.free)} that are free"


def told_of_memory(memory: TrainingMemory, module: LightningModule, data: object) -> str:
    """Tells what training takes on a device, and warns if that is more than there is."""
    parts = {"frozen": memory.frozen, "trained": memory.trained, "gradients": memory.gradients}
    parts |= {"optimizer": memory.optimizer, "average": memory.average, "activations": memory.activations or 0}
    told = ", ".join(f"{readable(size)} {name}" for name, size in parts.items() if size)
    if blocks := getattr(module, "computed_again", None):
        cost = sum(block.flops for block in blocks) / 1e12
        told += f" ({len(blocks)} blocks of the UNet are computed again, {cost:.2f} TFLOP a batch)"
    total = f"about {readable(memory.total)}" + ("" if memory.activations is not None else " without activations")
    if module.device.type != "cuda":
        return f"{total}: {told}"
    there = torch.cuda.get_device_properties(module.device).total_memory
    if warning := too_large(memory, there, module, data):
        rank_zero_warn(warning)
    return f"{total} of {readable(there)}: {told}"


def laid_out(title: str, facts: dict[str, list[str]]) -> str:
    """Lays facts out under their names, a line each, long ones broken; those that are empty are left out."""
    lines = [title]
    for name, told in facts.items():
        for number, fact in enumerate(fact for fact in told if fact):
            first, *rest = wrap(fact, WIDTH - 12, break_long_words=False, break_on_hyphens=False)
            lines.append(f"  {name if number == 0 else '':<10}{first}")
            lines += [f"{'':12}{line}" for line in rest]
    return "\n".join(lines) + "\n"
