"""The command line: Lightning's, with every class of this package known by its short name."""

import re
import sys
import warnings
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

# Importing these lets configs write EDMLoss for lit_edm.edm.loss.EDMLoss.
from lit_edm import cache, callbacks, checkpoints, data, edm, loggers, modules, optim, sdxl  # noqa: F401
from lit_edm.callbacks import EndOnSigterm, Pace, SeamlessResume
from lit_edm.callbacks.disk_room import standing
from lit_edm.checkpoints import WholeCheckpointIO, fault_of, find_last
from lit_edm.config_text import check_config
from lit_edm.errors import InputError
from lit_edm.usage import HELP
from lit_edm.wording import one_line

TERMINATED = 128 + 15
"""What a shell says of a process that SIGTERM ended: schedulers know by it that there is more to do."""


class Parser(LightningArgumentParser):
    """A parser whose errors are one line: what is wrong, under which key, and the nearest right name."""

    def format_help(self, *formatter: Any) -> str:
        """Returns what a subcommand takes, or what all of them are for."""
        return HELP if self._subcommands_action else super().format_help(*formatter)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one line and ends with exit code 2; raises where jsonargparse only tries one of several types."""
        if self.exit_on_error:
            fail(one_line(message))
        super().error(message, ex)

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Parses a config file; raises InputError if it cannot be read, or has a key twice."""
        if Path(path).is_file():  # and not on another machine
            check_config(Path(path))
        return super().parse_path(path, *args, **kwargs)


class CLI(LightningCLI):
    """LightningCLI whose runs can be ended at any moment and resumed as if they had not been.

    Checkpoints and logs are there whole or not at all, and a resumed run is what its config says, not what its
    checkpoint was.

    Args:
        settings: Of LightningCLI, beside those that every command line of this package has.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [Pace(), SeamlessResume(), EndOnSigterm()]},
            parser_class=Parser,
            **settings,
        )

    def _parse_ckpt_path(self) -> None:
        """Reads nothing from the checkpoint, whose hyperparameters would silently beat YAML and command line."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Returns a trainer that writes whole checkpoints, unless the config has it write them in another way.

        Raises:
            InputError: Lightning refuses its settings, or they make a run that cannot train or write.
        """
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise InputError(f"trainer: {error}") from error
        if trainer.accumulate_grad_batches < 1:
            raise InputError(f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; give 1 or more")
        if self.subcommand == "fit":
            check_folders(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()
        return trainer

    def find_checkpoint(self) -> None:
        """Raises InputError if there is no checkpoint to go on from: Lightning would begin anew with a mere warning."""
        wanted = str(self._get(self.config, "ckpt_path") or "")
        resumes, weights_only = self.subcommand == "fit", self._get(self.config, "weights_only")
        if wanted == "last":
            wanted = str(find_last(self.trainer, resumes, weights_only))
        elif wanted and wanted not in ("best", "hpc", "registry") and "://" not in wanted:
            if not Path(wanted).exists():
                raise InputError(
                    f"--ckpt_path {wanted}: there is no such checkpoint; correct it, or begin anew without"
                )
            if fault := fault_of(Path(wanted), resumes, weights_only):
                raise InputError(f"--ckpt_path {wanted} {fault}; name another, or last for the newest whole one")
        if wanted:  # as text: jsonargparse may have made it a path, in which Lightning does not know "last" again
            self.config_init[str(self.subcommand)]["ckpt_path"] = wanted

    before_fit = before_validate = before_test = before_predict = find_checkpoint


def check_folders(trainer: Trainer) -> None:
    """Raises InputError if a run cannot have the folders that it writes its config and logs to."""
    folders = [logger.save_dir for logger in trainer.loggers] or [trainer.default_root_dir]
    for folder in folders:
        if folder is not None and "://" not in str(folder):
            standing(Path(folder))


def mistake_behind(error: BaseException | None) -> BaseException | None:
    """Finds the user's mistake that an error comes from: jsonargparse wraps what constructors raise."""
    while error is not None and not isinstance(error, InputError) and not found_by_lightning(error):
        error = error.__cause__
    return error


def found_by_lightning(error: BaseException) -> bool:
    """Tells whether an error is Lightning's own judgement of a config, and not of what a part of ours has done."""
    names = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    ours = any(name.startswith("lit_edm.") and name != __name__ for name in names)
    return bool(names) and names[-1].startswith("lightning.") and not ours


def fail(message: str) -> NoReturn:
    """Prints one line and ends with exit code 2."""
    cause = message.rpartition("lit_edm.errors.InputError: ")[2]  # a loader's worker puts a traceback before it
    line = re.sub(r"\s*\n\s*", " ", cause.strip())  # other blanks may be those of a file's name
    sys.stderr.write(f"lit-edm: error: {line}\n")
    sys.exit(2)


def main(args: ArgsType = None) -> None:
    """Runs a subcommand of LightningCLI, as in `lit-edm fit --config configs/quickstart.yaml`.

    A mistake of the user's ends with one line that says what and where it is, and exit code 2; SIGTERM with 143.

    Args:
        args: Arguments in place of those of the command line.
    """
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training")  # the frozen networks, on purpose
    warnings.filterwarnings("ignore", ".*across ranks is zero")  # no validation images, on purpose
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec")  # Lightning's own
    try:
        CLI(args=args)
    except SIGTERMException:  # processes that Lightning started are done; one of them with an error would end all
        sys.exit(TERMINATED if getattr(rank_zero_only, "rank", 0) == 0 else 0)
    except (MisconfigurationException, ValueError) as error:
        if mistake := mistake_behind(error):
            fail(str(mistake))
        raise
