"""Data module of prompts to render: a list, a file, or a grid of prompts, seeds and scales of adapters."""

from itertools import groupby
from operator import itemgetter
from pathlib import Path

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lit_edm.batch import PictureRequest
from lit_edm.data.captions import read_text
from lit_edm.data.loading import check_least
from lit_edm.errors import InputError


class PromptsDataModule(LightningDataModule):
    """Requests a picture of every prompt with every seed and every scale, for `lit-edm predict`.

    Batches hold pictures of one scale. Several processes share them.

    Args:
        prompts: What to render; placeholders are replaced as in training.
        prompts_file: Text file with further prompts, one a line; empty lines are left out.
        seeds: Seeds of the noise, none negative.
        adapter_scales: Factors on the updates of adapters from files, beside that of each file.
        height: Of the pictures, in pixels.
        width: Of the pictures, in pixels.
        batch_size: Pictures rendered at once, on each device; the pictures do not depend on it.
    """

    def __init__(
        self,
        prompts: list[str] | None = None,
        prompts_file: Path | str | None = None,
        seeds: tuple[int, ...] = (0,),
        adapter_scales: tuple[float, ...] = (1.0,),
        height: int = 1024,
        width: int = 1024,
        batch_size: int = 1,
    ) -> None:
        super().__init__()
        self.prompts = prompts or []
        self.prompts_file = prompts_file
        self.seeds = list(dict.fromkeys(seeds))
        self.adapter_scales = list(dict.fromkeys(adapter_scales))
        self.height = height
        self.width = width
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Reads the prompts, and checks that there is something to render."""
        check_least(self, height=1, width=1, batch_size=1)
        for key, values in (("seeds", self.seeds), ("adapter_scales", self.adapter_scales)):
            if not values:
                raise InputError(f"data.init_args.{key} is empty: give at least one, or remove the line")
        if min(self.seeds) < 0:
            raise InputError(f"data.init_args.seeds: {min(self.seeds)} is negative: give 0 or more")
        if max(self.seeds) >= 2**64:
            raise InputError(f"data.init_args.seeds: {max(self.seeds)} is too large: give less than {2**64}")
        self.all_prompts = [*self.prompts, *self._lines()]
        if not self.all_prompts:
            raise InputError("there is no prompt: write some in data.init_args.prompts, or name a prompts_file")

    def requests(self) -> list[PictureRequest]:
        """Returns a request for each picture, scale by scale and seed by seed; called after setup."""
        size = (self.height, self.width)
        grid = ((scale, seed, p) for scale in self.adapter_scales for seed in self.seeds for p in self.all_prompts)
        return [
            PictureRequest(index=index, prompt=prompt, size=size, seed=seed, scale=scale)
            for index, (scale, seed, prompt) in enumerate(grid)
        ]

    def predict_dataloader(self) -> DataLoader[list[PictureRequest]]:
        """Returns the batches, each a list of requests.

        Raises:
            InputError: There are fewer batches than processes.
        """
        batches = self._batches()
        processes = 1 if self.trainer is None else self.trainer.world_size
        if len(batches) < processes:
            raise InputError(
                f"there are {len(batches)} batches of pictures for {processes} processes: "
                "lower data.init_args.batch_size, or trainer.devices"
            )
        return DataLoader(batches, batch_size=1, collate_fn=itemgetter(0))  # type: ignore[arg-type] (lists index)

    def _batches(self) -> list[list[PictureRequest]]:
        batches = []
        for _, group in groupby(self.requests(), itemgetter("scale")):
            requests = list(group)
            starts = range(0, len(requests), self.batch_size)
            batches += [requests[start : start + self.batch_size] for start in starts]
        return batches

    def _lines(self) -> list[str]:
        if self.prompts_file is None:
            return []
        path = Path(self.prompts_file).expanduser()
        if not path.is_file():
            raise InputError(f"{path} is no file: correct data.init_args.prompts_file")
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
