"""`python -m beit_jax.doctor`."""

import sys

from beit_jax.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
