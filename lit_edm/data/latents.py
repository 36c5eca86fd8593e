"""What a VAE makes of pictures, kept so that training need not read these."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lit_edm.cache import TensorCache
from lit_edm.data.images import ImageSource
from lit_edm.data.items import Item
from lit_edm.data.team import Team
from lit_edm.data.transforms import RandomViews, View
from lit_edm.errors import InputError


class Digests(dict[ImageSource, str]):
    """Digest of the bytes of each picture, which is read for it once, when it is first asked for."""

    def __missing__(self, image: ImageSource) -> str:
        self[image] = image.digest()
        return self[image]


@dataclass(frozen=True)
class LatentStore:
    """Keeps the moments of views, under what they follow from: the picture's bytes, the cut and the encoder.

    Args:
        cache: Where they are kept.
        settings: Names the encoder, weights included.
        digests: Digest of each picture's bytes.
    """

    cache: TensorCache
    settings: str
    digests: Mapping[ImageSource, str]

    def fill(self, items: Iterable[Item], views: RandomViews, encode: Callable[[Tensor], Tensor], team: Team) -> None:
        """Reads and encodes what is not kept yet of all that can be drawn; processes share that if they can.

        Args:
            items: What is drawn from.
            views: What may be drawn of a picture.
            encode: Maps pixels (B, 3, H, W) in [-1, 1] to moments (B, 2C, H / f, W / f), float32.
            team: The processes that do so together.
        """
        wanted = {self.key(item, view): (item, view) for item in items for view in views.all(item.size)}
        missing = self._missing(wanted)
        if self.cache.is_shared:
            team.wait()  # until all have looked, so that they share out the same
            for key in team.share(missing, "Encoding images"):
                self._encode(key, *wanted[key], encode)
            missing = self._missing(missing)  # of those whose machine does not see what others keep
        for key in team.all(missing, "Encoding images"):
            self._encode(key, *wanted[key], encode)

    def get(self, item: Item, view: View) -> Tensor:
        """Returns the moments of a view, (2C, H / f, W / f), float32.

        Raises:
            InputError: They are no longer kept.
        """
        kept = self.cache.get(self.key(item, view))
        if kept is None:
            raise InputError(
                f"the latents of {item.image.name} are gone from data.init_args.latent_cache: leave it alone while a "
                "run reads it; they are made again at the next start"
            )
        return kept["moments"]

    def key(self, item: Item, view: View) -> str:
        """Names all that the moments of a view follow from."""
        return json.dumps(["latents", self.digests[item.image], view.size, view.flip, item.cut(view), self.settings])

    def _missing(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key not in self.cache]

    def _encode(self, key: str, item: Item, view: View, encode: Callable[[Tensor], Tensor]) -> None:
        self.cache.put(key, {"moments": encode(item.pixels(view)[None])[0]})
