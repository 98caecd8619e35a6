"""Freed memory is kept: what is taken again was not given back."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from beit_jax.training import memory
kept = {keep} and memory.keep_freed()
import jax, jax.numpy as jnp

@jax.jit
def step(x):  # temporaries of 4 MB each
    y = jnp.sin(x)
    return ((y @ y) @ jnp.cos(y) @ (y + 1)).sum()

x = jnp.ones((1024, 1024))
faults = []
for _ in range(4):
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(int(kept), faults[-1] - faults[-2])
"""


def run(keep: bool) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept, faults = map(int, done.stdout.split())
    return bool(kept), faults


def test_a_step_takes_no_new_pages():
    kept, faults = run(True)
    if not kept:
        pytest.skip("not glibc")
    assert faults < 300  # pages of 4 kB
    assert run(False)[1] > 1000  # at least one temporary's
