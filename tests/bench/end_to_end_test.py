"""bench/end_to_end.py runs both feeds through the train loop and pairs their speeds."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.compiling import QUICKLY

ROOT = Path(__file__).parent.parent.parent
SETTINGS = [
    *("model.layers=1", "model.width=32", "model.heads=1", "model.mlp_width=64"),
    *("model.image_size=32", "data.image_size=32", "data.token_image_size=16"),
    *("tokenizer.image_size=16", "tokenizer.vocabulary=16", "data.mask.count=2"),
    "data.mask.min_block=1",
]


@pytest.mark.slow
def test_small(tmp_path):
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    levels = np.random.default_rng(0).integers(0, 256, (4, 40, 60, 3)).astype(np.uint8)
    for number, image in enumerate(levels):
        Image.fromarray(image).save(images / f"{number}.jpg")
    command = [sys.executable, "bench/end_to_end.py", f"--images={images}", "--batch=2"]
    command += ["--steps=2", "--pairs=1", f"--json={tmp_path}/result", "--set", *SETTINGS]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICKLY}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result").read_text())
    assert result["set"][-len(SETTINGS) :] == SETTINGS
    repeated, read = (result["runs"][name]["each"] for name in ("repeated", "from JPEGs"))
    assert len(repeated) == len(read) == 1
    assert min(repeated + read) > 0
    expected = [b / a for a, b in zip(repeated, read, strict=True)]
    assert result["ratios"] == pytest.approx(expected)
    assert result["ratio"] == pytest.approx(statistics.median(expected))
    for run in result["runs"].values():
        assert 0 <= run["data_wait_share"] < 1
