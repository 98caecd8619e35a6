"""Every test sees eight simulated devices, and writes nothing to the user's cache directory."""

import atexit
import os
import shutil
import tempfile

# Set before JAX or TensorFlow is imported. A test that starts a process passes these variables on
# unless it says otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
# Runs store compiled programs in the user's cache directory; the tests use their own.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="beit_jax_tests_")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
