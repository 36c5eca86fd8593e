"""FSDP2 as a strategy of Lightning: `trainer.strategy: fsdp2`."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from lit_edm.errors import InputError
from lit_edm.modules.sharding import average_gradients, clip_gradients, placed_like, unsharded, whole
from lit_edm.optim import GroupedProdigy


class FSDP2Strategy(ModelParallelStrategy):
    """Trains a UNet of which each process keeps a shard, with that shard's gradients and optimizer state: fsdp2.

    What is trained is that of ddp, to rounding. A checkpoint is one file, whole, and goes on under any strategy.
    Lightning's own class leaves what is not in shards to itself, and its checkpoints do not go on elsewhere.

    Args:
        process_group_backend: How processes talk; nccl on GPUs and gloo on CPUs if not given.
        timeout: Longest that processes wait for one another.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True, as elsewhere: checkpoints are whole."""
        return True

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False, as elsewhere: weights are in shards before."""
        return False

    def setup_environment(self) -> None:
        """Counts the processes, all of which share the data out."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup_optimizers(self, trainer: Any) -> None:
        """Makes the optimizers.

        Raises:
            InputError: One of them estimates its learning rate from sums over weights, of which it sees a part.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if "d" in optimizer.param_groups[0] and not isinstance(optimizer, GroupedProdigy):
                raise InputError(
                    f"model.init_args.optimizer: {type(optimizer).__name__} finds its rate from whole weights, which "
                    "trainer.strategy: fsdp2 has in shards; write GroupedProdigy in its place, which knows of them"
                )

    def post_backward(self, closure_loss: Tensor) -> None:
        """Averages the gradients of what is whole on every process; shards have averaged theirs."""
        super().post_backward(closure_loss)
        assert self.lightning_module is not None
        average_gradients(self.lightning_module.parameters())

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, on the first process: all but frozen weights, which the base has."""
        assert self.lightning_module is not None
        frozen = {name for name, parameter in self.lightning_module.named_parameters() if not parameter.requires_grad}
        state = self.lightning_module.state_dict()
        return {name: whole(value) for name, value in state.items() if name not in frozen}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Returns an optimizer's state as it would be on one process."""
        return mapped(optimizer.state_dict(), lambda _, value: whole(value))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint of any strategy."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads what a checkpoint has kept."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        for name, value in checkpoint["state_dict"].items():
            own[name].copy_(placed_like(value, own[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the optimizers' states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            of = dict(zip(numbers, parameters, strict=True))
            placed = mapped(
                state, lambda n, value, of=of: placed_like(value, of[n]) if value.shape == of[n].shape else value
            )
            optimizer.load_state_dict(placed)


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="FSDP2, for SDXLModule")


class ShardedTraining(LightningModule):
    """What a module does whose weights may be in shards; the same as any other where they are not."""

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips gradients, of which some may be in shards."""
        if self.device_mesh is None or not gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        clip_gradients(parameters, gradient_clip_val, by_norm=gradient_clip_algorithm != "value")

    def on_validation_epoch_start(self) -> None:
        """Lets each process validate by itself: they may have different numbers of batches."""
        self._validating = ExitStack()
        self._validating.enter_context(unsharded(self))

    def on_validation_epoch_end(self) -> None:
        """Goes back to shards, before averages make way for weights, and before checkpoints."""
        self._validating.close()


def check_strategy(strategy: Any, precision: str, stage: str, images: Any, whole: Mapping[str, object]) -> None:
    """Raises InputError if weights would be in shards for what wants them whole, and says what to do.

    Args:
        strategy: Of the trainer.
        precision: Of the trainer.
        stage: What the trainer does.
        images: The data module.
        whole: The model's settings that want whole weights, by name.
    """
    name = "trainer.strategy: fsdp2"
    if not isinstance(strategy, FSDP2Strategy):
        raise InputError(
            f"trainer.strategy is {type(strategy).__name__}, which leaves text encoders alone; write {name} instead"
        )
    if stage == "predict":
        raise InputError(f"{name} is for training; render with trainer.strategy: ddp, or on one device")
    if precision == "16-mixed":
        raise InputError(f"trainer.precision is 16-mixed, which {name} cannot scale the loss for; use bf16-mixed")
    for setting, value in whole.items():
        if value:
            raise InputError(
                f"model.init_args.{setting} is {value}, which {name} cannot split; remove the line, or write "
                "trainer.strategy: ddp"
            )
    if getattr(images, "needs_teacher", False):  # the UNet would run once more on some processes, and wait for others
        raise InputError(f"data.init_args.prior is TeacherPrior, which {name} cannot ask; use ClassImages, or ddp")


def mapped(state: Mapping[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """Returns an optimizer's state with its tensors changed, given the number of the parameter that each belongs to."""
    entries = {
        number: {key: change(number, value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}
