"""python -m posjax is the posjax command."""

from posjax.cli import main

main()
