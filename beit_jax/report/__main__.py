"""`python -m beit_jax.report`."""

import sys

from beit_jax.report.command import main

if __name__ == "__main__":
    sys.exit(main())
