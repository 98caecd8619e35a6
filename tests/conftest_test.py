"""What tests/conftest.py promises of every process that runs tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Says its name to a file and then can't be imported, as a package that is not installed.
STAND_IN = """
import os
with open(os.environ["IMPORTED"], "a") as file:
    file.write(f"{__name__}\\n")
raise ModuleNotFoundError(__name__)
"""


@pytest.mark.parametrize("processes", ["-n0", "-n1"])
def test_triton_is_imported_before_tensorflow(processes, tmp_path):
    """In pytest's process and in a worker's; the other order is a segmentation fault.

    Stand-ins write the order down, so the test says the same where Triton is not installed.
    """
    for name in ("triton", "tensorflow"):
        (tmp_path / f"{name}.py").write_text(STAND_IN)
    imported = tmp_path / "imported"
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", processes, "tests/data/decode_test.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "IMPORTED": str(imported)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ModuleNotFoundError: tensorflow" in done.stdout, done.stdout + done.stderr
    order = imported.read_text().split()
    assert order[0] == "triton"
    assert "tensorflow" in order
