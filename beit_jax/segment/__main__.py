"""`python -m beit_jax.segment`."""

import sys

from beit_jax.segment.command import main

if __name__ == "__main__":
    sys.exit(main())
