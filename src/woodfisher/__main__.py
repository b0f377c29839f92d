"""`python -m woodfisher`."""

import sys

from woodfisher.cli import main

if __name__ == "__main__":
    sys.exit(main())
