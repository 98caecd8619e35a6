"""Hostile files are refused in one line or take no harm; a reader that does harm is noticed."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import hostile, hostile_files


@pytest.mark.slow
def test_hostile_files_are_refused_or_harmless(tmp_path):
    row = hostile.soak(count=40, seed=1, folder=tmp_path / "hostile")
    assert row.failures == ()
    assert row.survived == row.tried == 40


def test_every_part_of_every_target_is_tried(tmp_path):
    for target in hostile.TARGETS:
        for name in (f"{target}", "set/labels.npy", "hf/config.json"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() and "." in target:
                header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
                path.write_bytes(len(header).to_bytes(8, "little") + header + b"a")
    (tmp_path / "record.json").write_text("{}")
    (tmp_path / "hf/config.json").write_text('{"a": {"b": [1]}}')
    found = list(hostile.cases(tmp_path, tmp_path / "canary", 0))
    assert {target for target, *_ in found} == set(hostile.TARGETS)
    assert len(found) > 1000
    assert len(set(found)) == len(found)


# In a process without threads, as the soak's; what a call does → how its outcome begins.
CALLS = """
import json, os, sys, time
from pathlib import Path
import beit_jax.tokenizers.loading
from tests.faults import hostile

def fail(text):
    raise FileNotFoundError(text)

hostile.SECONDS = 3
calls = {
    "harmless": lambda: 0,
    "KeyError: ": lambda: {}["a"],
    "the process died": lambda: os._exit(9),
    "no end within": lambda: time.sleep(30),
    "MemoryError: ": lambda: bytearray(1 << 43),
    "not one line": lambda: fail("two\\nlines"),
    "refused": lambda: fail("gone"),
    "a traceback on stderr": lambda: print("Traceback (most") or 0,
    "status 2 and 2 lines": lambda: print("error: a\\nerror: b") or 2,
    "refuse": lambda: print("error: a") or 2,
}
said = Path(sys.argv[1])
print(json.dumps({key: hostile._call(read, said) for key, read in calls.items()}))
"""


def test_what_a_call_does_is_seen(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", CALLS, str(tmp_path / "said")],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    found = json.loads(result.stdout)
    assert len(found) == 10
    for expected, outcome in found.items():
        assert outcome.startswith(expected), (expected, outcome)


def test_a_pickle_would_run_code(tmp_path):
    """What the canary is for: Python's own unpickler does what these ask."""
    canary = tmp_path / "canary"
    made = hostile_files.pickles(canary)
    for name in ("os.system", "eval", "posix.system", "obj of os.system", "inst of os.system"):
        pickle.loads(made[name])
        assert canary.exists(), name
        canary.unlink()
