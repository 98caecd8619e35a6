"""An image folder that is deleted while a run reads it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.faults import kill
from tests.faults.zygote import TRAINING, Zygote


@pytest.mark.slow
@pytest.mark.parametrize("steps", [100_000, 40], ids=["long", "short"])
def test_a_run_whose_image_folder_is_deleted_does_not_end_well(tmp_path, steps):
    """With one line, and nothing that is not finite in its log or its checkpoints."""
    images, workdir = tmp_path / "images", tmp_path / "run"
    random = np.random.default_rng(0)
    images.mkdir()
    for number in range(60):
        pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    settings = (
        "--config=tests/tasks/tiny.py:pretrain",
        f"--config.data.source=folder:{images}",
        f"--config.run.steps={steps}",
        "--config.run.checkpoint_every=3",
        "--config.run.eval_every=20",
    )
    with Zygote(modules=TRAINING, folder=tmp_path / "output") as zygote:
        run = zygote.run("main.py", f"--workdir={workdir}", *settings)
        while kill.line_count(workdir / "metrics.jsonl") < 3 and run.exit_code() is None:
            pass
        shutil.rmtree(images)
        assert run.wait() == 2, run.output()
    (error,) = [line for line in run.output().splitlines() if line.startswith("error: ")]
    assert "can't be decoded" in error
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        assert None not in json.loads(line).values()
