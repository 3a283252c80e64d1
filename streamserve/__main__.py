"""`python -m streamserve` is the `streamserve` command."""

import sys

from streamserve.cli import main

if __name__ == "__main__":
    sys.exit(main())
