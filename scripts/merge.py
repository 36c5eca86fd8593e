"""Merges adapters: `python scripts/merge.py --adapters a.safetensors b/ --weights 0.7 0.5 --output merged`.

With `--base`, writes a checkpoint with the adapters in it, in place of an adapter.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields

from jsonargparse import ArgumentParser

from lit_edm.errors import InputError
from lit_edm.sdxl.export import Format
from lit_edm.sdxl.merge import Merge
from lit_edm.sdxl.merge_files import merge_files


def main(args: Sequence[str] | None = None) -> None:
    """Takes the settings of merge_files and of Merge from the command line or a file; prints where the result is."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", action="config", help="YAML or JSON file with these settings.")
    parser.add_argument("--adapters", nargs="+", required=True, help="Files, or folders as SaveAdapter writes them.")
    parser.add_argument("--weights", nargs="+", type=float, help="One for each adapter; 1 for all if not given.")
    parser.add_argument("--formats", nargs="+", type=Format, default=["diffusers"], help="Layouts of the adapter.")
    parser.add_function_arguments(merge_files, skip={"adapters", "weights", "formats", "merge"})
    parser.add_class_arguments(Merge)
    settings = parser.parse_args(args).as_dict()
    del settings["config"]
    merge = {field.name: settings.pop(field.name) for field in fields(Merge)}
    try:
        print(f"Merged into {merge_files(merge=Merge(**merge), **settings)}")
    except InputError as error:
        sys.exit(f"merge.py: error: {error}")


if __name__ == "__main__":
    main()
