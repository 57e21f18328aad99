"""`python -m speechattn` is the command `speechattn`."""

import sys

from speechattn.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
