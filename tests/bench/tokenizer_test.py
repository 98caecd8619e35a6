"""bench/tokenizer.py runs, and its counts are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.compiling import QUICKLY

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_small(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(4):
        colours = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(colours).resize((96, 72))
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture.save(tmp_path / f"photos/{number}.jpg")
    command = [sys.executable, "bench/tokenizer.py", f"--images={tmp_path}/photos", "--width=16"]
    command += ["--size=32", "--count=4", "--batch=2", "--pairs=1", f"--json={tmp_path}/result"]
    environment = os.environ | {"XLA_FLAGS": QUICKLY}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result").read_text())
    assert "against float32" in done.stdout
    assert (result["photographs"], result["positions"]) == (4, 4 * 16)
    for row in result["against_float32"].values():
        assert row["agreement"] == pytest.approx(1 - row["differing"] / 64)
        assert row["margin_median"] <= row["margin_max"] < result["logits_standard_deviation"]
    assert result["scored"] == {"positions": 6, "of": 16, "same_ids": 1.0}
    errors = list(result["stages"].values())
    assert len(errors) == 10
    assert all(0 < error < 0.03 for error in errors)
