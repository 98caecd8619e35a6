"""What every bench needs: the package, also where it isn't installed, and the machine's name."""

import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def processor_name() -> str:
    """The processor's model, as far as the system tells."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
