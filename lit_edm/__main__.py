"""What `lit-edm` and `python -m lit_edm` run: help at once, all else once it is imported."""

import sys

from lit_edm.usage import HELP


def main() -> None:
    """Answers --help; has all other arguments be understood by lit_edm.cli, which takes seconds to import."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.stdout.write(HELP)
    else:
        from lit_edm.cli import main

        main()


if __name__ == "__main__":
    main()
