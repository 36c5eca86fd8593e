"""The pivot of pivotal tuning."""

from lit_edm.callbacks.train_during import TrainDuring
from lit_edm.errors import InputError


class FreezeEmbeddings(TrainDuring):
    """Stops training the new tokens' embeddings after a fraction of all optimizer steps; the UNet goes on alone.

    The case of TrainDuring that pivotal tuning is known for.

    Args:
        ti_frac: Fraction of all optimizer steps that train the embeddings, in [0, 1].

    Raises:
        InputError: ti_frac is outside [0, 1], the run has no last step to take a fraction of, or there are no new
            tokens.
    """

    def __init__(self, ti_frac: float = 0.5) -> None:
        if not 0 <= ti_frac <= 1:
            raise InputError(f"FreezeEmbeddings.ti_frac is {ti_frac}; it is a fraction of all steps, in [0, 1]")
        super().__init__("embeddings")
        self.stop = ti_frac  # 0 too, which trains none
