"""Entry point of ``python -m basinax.benchmarks``."""

import sys

from basinax.benchmarks import main

if __name__ == "__main__":
    sys.exit(main())
