"""``python -m bmtard``."""

import sys

from bmtard.cli import main

if __name__ == "__main__":
    sys.exit(main())
