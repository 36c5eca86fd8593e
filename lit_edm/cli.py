"""The command line: Lightning's, with every class of this package known by its short name."""

import difflib
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

# Importing these lets configs write EDMLoss for lit_edm.edm.loss.EDMLoss.
from lit_edm import cache, callbacks, data, edm, modules, optim, sdxl
from lit_edm.errors import InputError

CLASSES = [name for room in (cache, callbacks, data, edm, modules, optim, sdxl) for name in room.__all__]
BOILERPLATE = re.compile(
    "Does not validate|Subtypes:|Errors:|Given value|Problem with given|Expected a <class 'NoneType'>|Expected a path"
)


class Parser(LightningArgumentParser):
    """A parser whose errors are one line: what is wrong, under which key, and the nearest right name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints one line and ends with exit code 2; raises where jsonargparse only tries one of several types."""
        if self.exit_on_error:
            fail(one_line(message))
        super().error(message, ex)


class CLI(LightningCLI):
    """LightningCLI, but for one thing: a resumed run is what its config says, not what its checkpoint was.

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
            parser_class=Parser,
            **settings,
        )

    def _parse_ckpt_path(self) -> None:
        """Reads nothing from the checkpoint, whose hyperparameters would silently beat YAML and command line."""

    def find_checkpoint(self) -> None:
        """Raises InputError if there is no checkpoint to go on from: Lightning would begin anew with a mere warning."""
        wanted = str(self._get(self.config, "ckpt_path") or "")
        if wanted == "last":
            keepers = [callback for callback in self.trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
            folders = [str(keeper.dirpath) for keeper in keepers if keeper.dirpath]
            if not any(path for folder in folders for path in Path(folder).glob("last*.ckpt")):
                raise InputError(
                    f"--ckpt_path last: there is no last.ckpt in {' or '.join(folders) or 'a fixed folder'}; give "
                    "ModelCheckpoint a dirpath and save_last: true, or begin anew without --ckpt_path"
                )
        elif wanted and wanted not in ("best", "hpc", "registry") and "://" not in wanted and not Path(wanted).exists():
            raise InputError(f"--ckpt_path {wanted}: there is no such checkpoint; correct it, or begin anew without it")
        if wanted:  # as text: jsonargparse may have made it a path, in which Lightning does not know "last" again
            self.config_init[str(self.subcommand)]["ckpt_path"] = wanted

    before_fit = before_validate = before_test = before_predict = find_checkpoint


def one_line(message: str) -> str:
    """Reduces jsonargparse's nested account of all it tried to the innermost cause and the key it stands under."""
    if message.startswith("Problems parsing config"):
        return " ".join(message.split())
    keys: list[str] = []
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if match := re.match(r'Parser key "([^"]+)":\s*(.*)', line):
            keys.append(match[1])
            line = match[2]
        if line and not BOILERPLATE.match(line):
            where = ".init_args.".join(keys)
            return f"{where}: {reworded(line)}" if where else reworded(line)
    return message


def reworded(cause: str) -> str:
    """Says in a user's terms what jsonargparse says in its own."""
    cause = re.sub(r"\. Got value: Namespace.*", "", cause)
    if match := re.match(r"Expected a dot import path string: (\w+)$", cause):
        near = difflib.get_close_matches(match[1], CLASSES, n=1)
        hint = f"did you mean {near[0]}?" if near else "write its full import path, such as my_package.MyClass"
        return f"no class is called {match[1]}; {hint}"
    return re.sub(r"Expected a <class '(\w+)'>\. Got value: ", r"expected \1, got ", cause)


def input_error_behind(error: BaseException | None) -> InputError | None:
    """Finds the user's mistake that an error comes from: jsonargparse wraps what constructors raise."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error


def fail(message: str) -> NoReturn:
    """Prints one line and ends with exit code 2."""
    cause = message.rpartition("lit_edm.errors.InputError: ")[2]  # a loader's worker puts a traceback before it
    sys.stderr.write(f"lit-edm: error: {' '.join(cause.split())}\n")
    sys.exit(2)


def main(args: ArgsType = None) -> None:
    """Runs a subcommand of LightningCLI, as in `lit-edm fit --config configs/quickstart.yaml`.

    A mistake of the user's ends with one line that says what and where it is, and exit code 2.

    Args:
        args: Arguments in place of those of the command line.
    """
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training")  # the frozen networks, on purpose
    warnings.filterwarnings("ignore", ".*across ranks is zero")  # no validation images, on purpose
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec")  # Lightning's own
    try:
        CLI(args=args)
    except ValueError as error:
        if mistake := input_error_behind(error):
            fail(str(mistake))
        raise
