"""`python -m giong` is the command line."""

import sys

from giong.cli import main

if __name__ == "__main__":
    sys.exit(main())
