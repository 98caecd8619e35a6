"""Eight simulated devices for every test; only warnings from TensorFlow; no trace at home."""

import atexit
import os
import shutil
import tempfile

# Before JAX or TensorFlow is imported, and only here: a test that runs a process of its own hands
# down these variables unless it says otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
# Compiled programs are kept in the user's cache directory: not the tests'.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="beit_jax_tests_")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
