"""Merges adapters: `python scripts/merge.py --adapters a.safetensors b/ --weights 0.7 0.5 --output merged`.

With `--base`, writes a checkpoint with the adapters in it, in place of an adapter.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import get_args

from jsonargparse import ArgumentError, ArgumentParser

from lit_edm.cli import one_line
from lit_edm.errors import InputError
from lit_edm.sdxl.export import Format
from lit_edm.sdxl.merge import Merge
from lit_edm.sdxl.merge_files import merge_files


def main(args: Sequence[str] | None = None) -> None:
    """Takes the settings of merge_files and of Merge from the command line or a file; prints where the result is."""
    parser = ArgumentParser(description=__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML or JSON file with these settings.")
    parser.add_argument("--adapters", nargs="+", required=True, help="Files, or folders as SaveAdapter writes them.")
    parser.add_argument("--weights", nargs="+", type=float, help="One for each adapter; 1 for all if not given.")
    parser.add_argument(
        "--formats", nargs="+", choices=get_args(Format), default=["diffusers"], help="Layouts of the adapter."
    )
    parser.add_function_arguments(merge_files, skip={"adapters", "weights", "formats", "merge"})
    parser.add_class_arguments(Merge)
    try:
        settings = parser.parse_args(args).as_dict()
        del settings["config"]
        merge = Merge(**{field.name: settings.pop(field.name) for field in fields(Merge)})
        print(f"Merged into {merge_files(merge=merge, **settings)}")
    except (ArgumentError, InputError) as error:
        parser.exit(2, f"merge.py: error: {one_line(str(error))}\n")


if __name__ == "__main__":
    main()
