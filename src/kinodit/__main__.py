"""`python -m kinodit` and `torchrun -m kinodit` are the `kinodit` command."""

import sys

from kinodit.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
