"""Run directories and checkpoints of version 0.1.0 resume and export: see README.md beside."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from beit_jax import jobs, weights
from beit_jax.tokenizers.loading import load_params

ARCHIVE = Path(__file__).parent / "runs_0.1.0.tar.xz"
# Resumed from where to where. Old runs had one device, the tests have eight: sums differ in the
# last bits, and twelve steps at a learning rate of 1e-2 make a little more of it.
STEPS = {"tokenizer": (6, 12), "pretrain": (12, 16), "classify": (6, 12)}
CLOSE = {"rtol": 2e-3, "atol": 1e-4}
# What a last bit can move by one image, token or code more or less.
COUNTED = {"top1": 1 / 8, "top5": 1 / 8, "mlm_acc": 1 / 40, "codes_used": 1}
TIMED = ("images_per_second", "images_per_second_per_chip", "data_wait_share", "seconds_left")


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def metrics(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("run", STEPS)
def test_a_run_resumes_and_ends_as_it_did(old, run):
    """Same steps, same metrics, held-out ones included, as the old code's uninterrupted run."""
    start, end = STEPS[run]
    config = json.loads((old / run / "config.json").read_text())
    if run == "pretrain":
        config["tokenizer"]["path"] = str(old / "tokenizer.safetensors")
    summary = jobs.run(config, workdir=str(old / run))
    assert summary["steps"] == end
    new, before = metrics(old / run / "metrics.jsonl"), metrics(old / f"{run}_metrics.jsonl")
    assert [line["step"] for line in new] == [line["step"] for line in before]
    resumed = [pair for pair in zip(new, before, strict=True) if pair[0]["step"] > start]
    assert len(resumed) >= end - start
    for found, wanted in resumed:
        assert found.keys() == wanted.keys()
        for name in found.keys() - set(TIMED):
            counted = COUNTED.get(name.removeprefix("eval_").removeprefix("ema_"))
            if counted is not None:
                assert abs(found[name] - wanted[name]) <= 1.001 * counted, (name, found)
            else:
                np.testing.assert_allclose(found[name], wanted[name], **CLOSE, err_msg=name)


@pytest.mark.parametrize(
    ("source", "format", "name"),
    [
        ("pretrain/checkpoints/12", "hugging_face", "export_hugging_face"),
        ("pretrain/checkpoints/12", "timm", "export_timm.safetensors"),
        ("pretrain/checkpoints/12", "unilm", "export_unilm.pth"),
        ("classify_best", "hugging_face", "export_classify"),
    ],
)
def test_a_checkpoint_exports_the_same_file(old, tmp_path, source, format, name):
    """Every tensor bit for bit, and the config that goes with it."""
    weights.export_checkpoint(str(old / source), format=format, output=str(tmp_path / name))
    found, wanted = tmp_path / name, old / name
    if format == "unilm":
        torch = pytest.importorskip("torch")
        load = lambda path: torch.load(path, weights_only=True)["model"]  # noqa: E731
        found, wanted = load(found), load(wanted)
    else:
        if format == "hugging_face":
            for file in ("config.json", "preprocessor_config.json"):
                now, before = (json.loads((p / file).read_text()) for p in (found, wanted))
                assert before.items() <= now.items(), file
            found, wanted = found / "model.safetensors", wanted / "model.safetensors"
        found, wanted = (safetensors.numpy.load_file(path) for path in (found, wanted))
    assert list(found) == list(wanted)
    for key in wanted:
        np.testing.assert_array_equal(np.asarray(found[key]), np.asarray(wanted[key]), err_msg=key)


def test_an_old_config_still_parses(old):
    for run in STEPS:
        config = jobs.parse_job(json.loads((old / run / "config.json").read_text()))
        assert config.task == run


def test_an_old_tokenizer_file_still_loads(old):
    config = json.loads((old / "pretrain" / "config.json").read_text())
    config["tokenizer"]["path"] = str(old / "tokenizer.safetensors")
    params = load_params(jobs.parse_job(config).tokenizer)
    stored = safetensors.numpy.load_file(old / "tokenizer.safetensors")
    np.testing.assert_array_equal(params["codebook"], stored["codebook"])
