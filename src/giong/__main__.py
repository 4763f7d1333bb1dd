"""`python -m giong` is the command line."""

from giong.cli import main

main()
