"""`python -m beit_jax.features`."""

import sys

from beit_jax.features.command import main

if __name__ == "__main__":
    sys.exit(main())
