"""`python -m giong.cli` is the command line too."""

from giong.cli import main

main()
