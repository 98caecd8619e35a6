"""Freed memory is kept: what is taken again was not given back."""

import subprocess
import sys

import pytest

# What XLA does on a CPU: one buffer at the start of a program, freed at its end. The C library asks
# 64 MB of the system each time, unless told otherwise.
PROGRAM = """
import ctypes, resource
from beit_jax.training import memory
kept = {keep} and memory.keep_freed()
library = ctypes.CDLL("libc.so.6")
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
size = 64 * 2**20
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = library.malloc(size)
    ctypes.memset(buffer, 1, size)
    library.free(buffer)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(keep: bool) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept, faults = map(int, done.stdout.split())
    return bool(kept), faults


def test_a_buffer_taken_again_has_its_pages():
    kept, faults = run(True)
    if not kept:
        pytest.skip("not glibc")
    assert faults < 20
    assert run(False)[1] > 30  # 64 MB in pages of 4 kB, or fewer where the system has large ones
