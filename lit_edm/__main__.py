"""Lets `python -m lit_edm` be the same as `lit-edm`."""

from lit_edm.cli import main

main()
