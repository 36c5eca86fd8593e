"""Keeps new tokens as large as those of the vocabulary."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.optim import Optimizer

from lit_edm.errors import InputError
from lit_edm.modules import SDXLModule


class RetractEmbeddings(Callback):
    """Draws the standard deviation of the new tokens' embeddings back to that of the vocabulary's, encoder by encoder.

    After each optimizer step that trained them, and no other, they are multiplied by (std of table / std of rows) to
    the power of strength. That belongs to the step: averages of the weights see its result, wherever they stand in
    trainer.callbacks.

    Args:
        strength: In (0, 1]; 1 keeps the standard deviation exactly, 0.1 is what diffusers' training script does.

    Raises:
        InputError: strength is outside (0, 1], or there are no new tokens.
    """

    def __init__(self, strength: float = 1.0) -> None:
        if not 0 < strength <= 1:
            raise InputError(f"RetractEmbeddings.strength is {strength}; it must be in (0, 1]")
        self.strength = strength

    def on_fit_start(self, trainer: Trainer, pl_module: SDXLModule) -> None:
        """Measures the tables, and joins the optimizers' steps."""
        embeddings = pl_module.conditioner.extended_embeddings()
        if not embeddings:
            raise InputError("RetractEmbeddings is about new tokens, but model.init_args.tokens names none")
        self.embeddings = [(embedding, embedding.table.weight.float().std()) for embedding in embeddings]
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self.after_step)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Retracts the rows that the optimizer has stepped: those of a rate above 0 that had a gradient."""
        groups = (group["params"] for group in optimizer.param_groups if group["lr"] > 0)
        stepped = {id(p) for parameters in groups for p in parameters if p.grad is not None}
        for embedding, std in self.embeddings:
            if id(embedding.rows) in stepped:
                embedding.rows.mul_((std / embedding.rows.std()) ** self.strength)
