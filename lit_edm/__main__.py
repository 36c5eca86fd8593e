"""What `lit-edm` and `python -m lit_edm` run: help at once, all else once it is imported."""

import gc
import sys

from lit_edm.usage import HELP


def main() -> None:
    """Answers --help; has all other arguments be understood by lit_edm.cli, which takes seconds to import."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.stdout.write(HELP)
    else:
        gc.disable()  # nothing that is imported is garbage, and looking for it takes a fifth of the time
        from lit_edm.cli import main

        gc.freeze()  # nor will any of it be, later on
        gc.enable()
        main()


if __name__ == "__main__":
    main()
