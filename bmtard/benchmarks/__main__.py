"""``python -m benchmarks`` and ``python -m bmtard.benchmarks``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
