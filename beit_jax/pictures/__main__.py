"""`python -m beit_jax.pictures`."""

import sys

from beit_jax.pictures.command import main

if __name__ == "__main__":
    sys.exit(main())
