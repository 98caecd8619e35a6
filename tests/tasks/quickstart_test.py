"""The quickstart, its second call, and the notebook about its run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from beit_jax import jobs
from beit_jax.config import ConfigError
from beit_jax.tasks import quickstart
from beit_jax.weights import native
from tests.tasks import tiny

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """Tokenizer, pre-training, table and picture, of a few steps each."""
    workdir = tmp_path_factory.mktemp("story")
    config = jobs.parse_job(tiny.story().to_dict())
    return workdir, config, quickstart.run(config, workdir=str(workdir))


def test_images_for_knn_are_opened_before_the_first_job(tmp_path):
    values = tiny.story()
    values.pretrain.online.every = 2
    values.pretrain.online.source = f"folder:{tmp_path}/none"
    values.pretrain.online.holdout = 2
    with pytest.raises(ConfigError, match=r"^config\.pretrain\.online\.source: no such folder"):
        quickstart.run(jobs.parse_job(values.to_dict()), workdir=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "tokenizer").exists()


@pytest.mark.slow
def test_the_notebook_runs_on_a_quickstart_run(story, tmp_path):
    """All cells in order, as a kernel runs them."""
    workdir, _, _ = story
    notebook = json.loads((ROOT / "examples/quickstart.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    program = tmp_path / "notebook.py"
    program.write_text("\n\n".join(sources))
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=ROOT / "examples",
        env=os.environ | {"BEIT_JAX_RUN": str(workdir), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    # Chance is one in six textures; every block has its accuracy; masked tokens were predicted.
    lines = done.stdout.splitlines()
    assert "chance    16.7%" in lines
    assert [line.split()[1] for line in lines if line.startswith("block ")] == ["1", "2"]
    assert lines[-1].endswith("% of the masked tokens are right")


@pytest.mark.slow
def test_the_whole_story_and_again(story, capsys):
    """The second call continues, changes nothing, and prints the table that the first did."""
    workdir, config, first = story
    scratch, pretrained = (first["classify"][name][0] for name in ("scratch", "pretrained"))
    assert scratch["steps"] == pretrained["steps"] == 4
    assert 0 <= scratch["top1"] <= scratch["top5"] <= 1
    # The untrained weights are those that pre-training started from, not those it ended with.
    before, after = (first["probe"][name]["knn"]["accuracy"] for name in ("before", "after"))
    assert before.keys() == after.keys() == {"1", "2"}
    started = native.read_params(str(workdir / "untrained"))
    ended = native.read_params(str(workdir / "pretrain"))
    assert np.abs(started["lm_head"]["kernel"] - ended["lm_head"]["kernel"]).max() > 1e-4
    assert (workdir / "reconstruction.png").exists()
    wanted = {"loss", "accuracy", "token_entropy", "majority_accuracy", "chance_loss"}
    assert wanted | {"images_per_second", "seconds"} <= first.keys()
    second = quickstart.run(config, workdir=str(workdir))
    printed = capsys.readouterr().out
    assert "held-out masked tokens" in printed
    assert "k nearest neighbours" in printed
    for name in ("scratch", "pretrained"):
        assert second["classify"][name][0]["top1"] == first["classify"][name][0]["top1"]
    assert all(first[name] == second[name] for name in wanted | {"images_per_second"})
    assert second["seconds"] > first["seconds"]
