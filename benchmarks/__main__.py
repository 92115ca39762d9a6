"""``python -m benchmarks`` in a checkout: the same as ``bmtard bench``."""

import sys

from bmtard.benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
