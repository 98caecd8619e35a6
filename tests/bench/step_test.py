"""bench/step.py runs without TensorFlow, and all its sides compute the same."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiling import QUICKLY

ROOT = Path(__file__).parent.parent.parent
BATCH = 2
SETTINGS = [
    "model.layers=1",
    "model.width=64",
    "model.heads=1",
    "model.mlp_width=128",
    "model.image_size=32",
    "tokenizer.image_size=16",
    "tokenizer.width=16",
    "tokenizer.vocabulary=64",
    "data.mask.count=2",
    "data.mask.min_block=1",
]


@pytest.mark.slow
def test_small(tmp_path):
    for name in ("torch", "transformers", "dall_e"):
        pytest.importorskip(name, reason="the bench measures against it")
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    command = [sys.executable, "bench/step.py", f"--batch={BATCH}", "--pairs=3", "--tokenizer"]
    command += [f"--json={tmp_path}/result", "--set", *SETTINGS]
    environment = os.environ | {
        "PYTHONPATH": str(blocked),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "XLA_FLAGS": QUICKLY,
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result").read_text())
    assert result["set"] == SETTINGS
    steps = result["steps"]
    assert list(steps) == ["student", "with tokenizer"]
    assert steps["with tokenizer"]["flops_per_image"] > steps["student"]["flops_per_image"] > 0
    for step in steps.values():
        native, peer, eager = step["sides"].values()
        assert eager["attention"] == "eager"
        assert eager["loss"] == pytest.approx(peer["loss"], rel=1e-5)
        # With tokenizer, too: the same weights give the same tokens.
        assert native["loss"] == pytest.approx(peer["loss"], rel=1e-5)
        assert native["attention"] == "xla"
        assert peer["attention"] in ("sdpa", "eager")
        assert native["peak_memory_bytes"] > 4 * 3 * 8 * 64**2  # a block and its two moments
        assert peer["peak_memory_bytes"] is None
        for side in (native, peer):
            assert len(side["each"]) == 3
            assert min(side["each"]) > 0
            assert side["seconds"] == statistics.median(side["each"])
            assert side["images_per_second"] == pytest.approx(BATCH / side["seconds"])
            assert side["mfu"] is None  # a CPU's peak isn't known
        pairs = zip(native["each"], peer["each"], strict=True)
        assert peer["ratio"] == pytest.approx(statistics.median(b / a for a, b in pairs))
    without = steps["student"]["sides"]["beit_jax"]["loss"]
    assert steps["with tokenizer"]["sides"]["beit_jax"]["loss"] != without  # other tokens
    assert "with tokenizer" in done.stdout
