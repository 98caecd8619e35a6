"""Checks of a config and a machine before a long run: `python -m beit_jax.doctor`."""

from beit_jax.doctor.command import main as main
