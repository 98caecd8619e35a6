"""Settings of the C library for runs on a CPU, whose steps allocate and free much memory.

This module must be usable before JAX is imported, so it imports nothing of the package.
"""

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
    """Makes the C library keep freed memory instead of returning it to the system.

    At the start of a program on a CPU, XLA allocates one buffer for all temporaries, and frees it
    at the end: 0.9 GB for BEiT-B's step. The C library requests a buffer of that size from the
    system every time, and the system zeroes every page when it is first touched, which takes a
    fifth of the step's processor time. The price of keeping it: the process never shrinks.

    Call it before JAX is imported, since existing threads keep their settings. It is not for a host
    with an accelerator: nothing is gained there, and the threads of the input pipeline would
    contend for one arena.

    Returns:
      Whether the settings were made; False where the C library is not glibc.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    # One arena: those of threads cannot grow beyond 64 MB; larger sizes come from the system.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    return all([mallopt(name, value) for name, value in settings])
