"""What a run on a CPU does about memory that comes and goes with every step.

Imports nothing: it's wanted before JAX is.
"""

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
    """Has the C library keep memory that is freed, instead of giving it back to the system.

    XLA takes one buffer for everything temporary at the start of a program on a CPU and frees it at
    the end: BEiT-B's step takes 0.9 GB. Such a size the C library asks of the system each time,
    which hands it out page by page, each zeroed when it is first touched: a fifth of the step's
    processor time. The process stays as large as it ever was; that is the price.

    Before JAX is imported: threads that exist already keep their ways. Not for a host with an
    accelerator: it gains nothing there, and the input's many threads would wait for each other.

    Returns:
      Whether there was something to set: false where the C library isn't glibc.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    # One arena: those of threads can't grow beyond 64 MB, and ask the system for what is larger.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    return all([mallopt(name, value) for name, value in settings])
