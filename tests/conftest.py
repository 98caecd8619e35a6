"""What every process that runs tests does first, before it imports a test.

Every test sees eight simulated devices, compiles quickly, and writes nothing to the user's cache
directory. PyTorch's compiler is loaded before TensorFlow can be, whichever a test imports first.
"""

import atexit
import contextlib
import os
import shutil
import tempfile

from tests.compiling import EIGHT_DEVICES

# Set before JAX or TensorFlow is imported. A test that starts a process passes these variables on
# unless it says otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{EIGHT_DEVICES} " + os.environ.get("XLA_FLAGS", "")  # of two, XLA takes the last
    ).strip()
# Runs store compiled programs in the user's cache directory; the tests use their own.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="beit_jax_tests_")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# PyTorch as PyPI has it brings Triton along. Both Triton and TensorFlow hold a copy of LLVM, and a
# process that loads TensorFlow's first dies of a segmentation fault when it loads Triton's, which
# transformers does; the other order works. This takes 0.1 s, importing torch would take over 1 s.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401
