"""Writes a run's checkpoint, or an adapter, in other formats: `python scripts/export.py last.ckpt my_style`.

With `--base`, writes a whole checkpoint with the adapter in it, in place of an adapter:
`python scripts/export.py my_style.safetensors merged --base stabilityai/stable-diffusion-xl-base-1.0`.
"""

from collections.abc import Sequence
from typing import get_args

from jsonargparse import ArgumentError, ArgumentParser

from lit_edm.cli import one_line
from lit_edm.errors import InputError
from lit_edm.modules.convert import convert
from lit_edm.sdxl.export import Format


def main(args: Sequence[str] | None = None) -> None:
    """Takes the settings of convert from the command line, and tells what was written."""
    parser = ArgumentParser(description=__doc__, exit_on_error=False)
    parser.add_function_arguments(convert, as_positional=True, skip={"formats"})
    parser.add_argument(
        "--formats", nargs="+", choices=get_args(Format), default=["diffusers"], help="Layouts of the adapter."
    )
    try:
        settings = parser.parse_args(args)
        written = convert(**settings.as_dict())
    except (ArgumentError, InputError) as error:
        parser.exit(2, f"export.py: error: {one_line(str(error))}\n")
    print("\n".join(str(path) for path in sorted(settings.output.iterdir())))
    if written and written.lycoris and "diffusers" in settings.formats:
        print(f"Diffusers does not read the updates of {', '.join(written.lycoris)}; see {written.lycoris_file}.")


if __name__ == "__main__":
    main()
