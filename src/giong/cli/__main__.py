"""`python -m giong.cli` is the command line too."""

import sys

from giong.cli import main

if __name__ == "__main__":
    sys.exit(main())
