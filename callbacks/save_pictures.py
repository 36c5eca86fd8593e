"""Writes what `lit-edm predict` renders."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from lit_edm.batch import PictureRequest, RequestsPictures
from lit_edm.callbacks.picture_info import picture_info
from lit_edm.callbacks.sheet import contact_sheet, to_pictures
from lit_edm.errors import InputError
from lit_edm.files import write_whole
from lit_edm.modules import SDXLModule


class SavePictures(BasePredictionWriter):
    """Writes a PNG for each picture that `lit-edm predict` renders, and contact sheets of all.

    The run's folder gets pictures/<number>_<words of the prompt>.png, each with the settings that it follows from in
    its metadata (parameters, as A1111 writes them, and lit_edm, JSON), and pictures/sheet_<number>.png with a prompt a
    column, and a seed and scale of adapters a row. Of several processes each writes its own pictures, the first sheets.

    Args:
        folder: Name of the pictures' folder in the run's folder.
        columns: Prompts on a sheet, those beyond go to further sheets; 0 makes no sheets.
        side: Width and height in pixels of the square that each picture is fitted into on a sheet.

    Raises:
        InputError: The folder is no name of one, or a number is out of range.
    """

    def __init__(self, folder: str = "pictures", columns: int = 8, side: int = 256) -> None:
        super().__init__("batch")
        if not folder or Path(folder).name != folder:
            raise InputError(f"SavePictures.folder is '{folder}'; it is the name of a folder, such as pictures")
        if columns < 0 or side < 1:
            raise InputError(f"SavePictures has columns: {columns} and side: {side}; give at least 0 and 1")
        self.folder_name = folder
        self.columns = columns
        self.side = side
        self.folder = Path(folder)

    def on_predict_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        """Asks for the run's folder where all processes do, for log_dir is a collective call."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / self.folder_name

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: SDXLModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: list[PictureRequest],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes the pictures of a batch."""
        settings = pl_module.picture_settings()
        for request, picture in zip(batch, to_pictures(prediction), strict=True):
            info = picture_info(request, settings)
            write_whole(self.path(request), lambda part: picture.save(part, "PNG", pnginfo=info))  # noqa: B023

    def on_predict_end(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        """Draws the sheets when all processes are done."""
        trainer.strategy.barrier("SavePictures")
        images: Any = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and self.columns and isinstance(images, RequestsPictures):
            for number, sheet in enumerate(self.sheets(images.requests())):
                write_whole(self.folder / f"sheet_{number:02d}.png", lambda part: sheet.save(part, "PNG"))  # noqa: B023

    def path(self, request: PictureRequest) -> Path:
        """Returns where a picture is written to, under a name that is one of a file whatever the prompt."""
        words = re.sub(r"[^a-z0-9]+", "-", request["prompt"].lower())[:40].strip("-")
        return self.folder / f"{request['index']:05d}{'_' if words else ''}{words}.png"

    def sheets(self, requests: Sequence[PictureRequest]) -> Iterator[Image.Image]:
        """Yields the sheets of pictures that have been written."""
        rows: dict[str, list[PictureRequest]] = {}
        for request in requests:
            rows.setdefault(f"seed {request['seed']}, adapters x {request['scale']:g}", []).append(request)
        prompts = [request["prompt"] for request in next(iter(rows.values()))]
        for start in range(0, len(prompts), self.columns):
            columns = slice(start, start + self.columns)
            pictures = {title: [self.read(request) for request in row[columns]] for title, row in rows.items()}
            yield contact_sheet(pictures, prompts[columns], self.side)

    def read(self, request: PictureRequest) -> Image.Image:
        """Reads a picture that has been written."""
        with Image.open(self.path(request)) as picture:
            picture.load()
        return picture
