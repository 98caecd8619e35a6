"""The input bench: its crops and masks are official; views keep their distance from Pillow's."""

import argparse
import importlib.util
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent.parent / "bench"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("input_bench", FOLDER / "input.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def test_masks_are_the_official_generators(bench):
    """Its moments are in the specification: mean 74.47, deviation 0.99."""
    random.seed(0)
    draw = bench.mask_generator(np)
    counts = [int(draw().sum()) for _ in range(500)]
    assert max(counts) == 75
    assert np.mean(counts) == pytest.approx(74.47, abs=4 * 0.99 / 500**0.5)


def test_boxes_fit(bench):
    random.seed(0)
    for width, height in ((500, 375), (40, 1000), (3, 3)):
        for _ in range(100):
            left, top, w, h = bench.random_box(width, height)
            assert left >= 0
            assert top >= 0
            assert left + w <= width
            assert top + h <= height


def test_views_of_photographs_stay_close_to_pillows(bench):
    folder = os.environ.get("BEIT_JAX_IMAGES")
    if not folder:
        pytest.skip("needs photographs: set BEIT_JAX_IMAGES to a folder of JPEGs")
    found = bench.differences(folder, count=25)
    for name in ("image", "token_image"):
        assert found[f"official {name}"]["mean"] < 0.6
        assert found[f"official {name}"]["largest"] < 1.5
        # Where the crop is brighter or darker than the image, contrast's mean is another.
        assert found[f"fast {name}"]["mean"] < 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fast", "tf.data", "pillow"])
def test_a_pipeline_answers(bench, name, tmp_path):
    from PIL import Image

    levels = np.random.default_rng(0).integers(0, 256, (4, 60, 80, 3)).astype(np.uint8)
    for number, image in enumerate(levels):
        Image.fromarray(image).save(tmp_path / f"{number}.jpg")
    flags = argparse.Namespace(images=str(tmp_path), batch=2, core=0)
    with bench.Worker(name, flags, python=sys.executable) as worker:
        assert not worker.error
        answer = worker.ask(1)
    assert answer["milliseconds"] > 0
    assert answer["images_per_second"] > 0
