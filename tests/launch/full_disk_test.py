"""A host whose disk is full still says how main.py ended: "lost" would start it again and again."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.disk import can_mount

WORKER = Path(__file__).parent.parent.parent / "launch/worker.sh"
MAIN = """
import sys
with open(sys.argv[1], "wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError:
        sys.exit(74)
"""


def test_the_status_is_written_to_a_disk_that_main_filled(tmp_path):
    if not can_mount():
        pytest.skip("needs a file system of its own")
    program = f"""
set -e
mount -t tmpfs -o size=256k none {tmp_path}
export BEIT_JAX_ROOT={tmp_path}
mkdir -p {tmp_path}/code {tmp_path}/run {tmp_path}/.venv/bin
ln -s {sys.executable} {tmp_path}/.venv/bin/python
cat > {tmp_path}/code/main.py
bash {WORKER} supervise {tmp_path}/ballast > /dev/null || true
test "$(df --output=avail {tmp_path} | tail -n 1)" -eq 0
bash {WORKER} status
"""
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-c", program], input=MAIN, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[2:4] == ["exit", "74"]
