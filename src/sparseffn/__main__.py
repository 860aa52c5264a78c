"""`python -m sparseffn` is the command `sparseffn`."""

import sys

from sparseffn.cli import main

if __name__ == "__main__":
    sys.exit(main())
