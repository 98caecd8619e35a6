"""The bench of segmentation's input: every side answers."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parent.parent.parent / "bench"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location(
        "segment_input_bench", FOLDER / "segment_input.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


@pytest.fixture
def pairs(bench, tmp_path) -> str:
    rng = np.random.default_rng(0)
    for number in range(3):
        image = rng.integers(0, 256, (60, 90, 3)).astype(np.uint8)
        labels = rng.integers(0, 4, (60, 90)).astype(np.uint8)
        bench._write(tmp_path, str(number), Image.fromarray(image), Image.fromarray(labels))
    return str(tmp_path)


def test_resized_copies_keep_their_shape_and_their_labels(bench, pairs, tmp_path):
    to = bench.write_resized(pairs, tmp_path / "resized", shorter=20)
    for image, labels in bench._files(to):
        assert Image.open(image).size == Image.open(labels).size == (30, 20)
        assert set(np.unique(np.asarray(Image.open(labels)))) <= set(range(4))


@pytest.mark.slow
@pytest.mark.parametrize("side", ["native", "decoding", "opencv"])
def test_a_side_answers(bench, pairs, side):
    command = [
        sys.executable,
        str(FOLDER / "segment_input.py"),
        f"--side={side}",
        f"--pairs={pairs}",
    ]
    with bench.Answering([*command, "--crop=32"]) as worker:
        assert worker.hello == side
        assert worker.ask(4) > 0
