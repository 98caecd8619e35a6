"""How programs of the tests are compiled, in this process and in those that tests start."""

# Tests run their programs for milliseconds, and compiling them is most of what the suite does.
# LLVM's optimisation is a third of that; it changes neither XLA's own passes nor what is computed.
QUICKLY = "--xla_backend_optimization_level=0"
EIGHT_DEVICES = f"{QUICKLY} --xla_force_host_platform_device_count=8"
