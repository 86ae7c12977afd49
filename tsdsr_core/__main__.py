"""Lets ``python -m tsdsr_core`` run the command ``tsdsr``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
