"""The main job end to end: killed and resumed, on photographs, with held-out figures that hold."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from beit_jax import jobs
from beit_jax.models.flops import encoder_flops, matmul_flops
from beit_jax.models.heads import masked_image_model
from beit_jax.tasks import pretrain
from beit_jax.tasks.token_statistics import token_statistics
from beit_jax.tokenizers.loading import load_params, open_tokenizer
from beit_jax.tokenizers.tokenizer import Tokenizer
from beit_jax.training import checkpoint, metrics
from configs import beit_base, beit_large
from tests.compiling import QUICKLY
from tests.tasks import tiny

ROOT = Path(__file__).parent.parent.parent


def start(workdir, *overrides, config="tests/tasks/tiny.py"):
    environment = os.environ | {"XLA_FLAGS": QUICKLY}  # one device
    return subprocess.Popen(
        [sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}", *overrides],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def losses(workdir):
    lines = metrics.read(f"{workdir}/metrics.jsonl")
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def saved_state(workdir):
    """Every array of the newest checkpoint, by name."""
    import orbax.checkpoint as ocp

    newest = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    with ocp.PyTreeCheckpointer() as checkpointer:
        folder = workdir / "checkpoints" / str(newest) / "state"
        stored = checkpointer.metadata(folder).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        tree = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=plain))
    return newest, jax.tree_util.tree_leaves_with_path(tree)


@pytest.mark.slow
def test_kill_and_resume_is_bit_exact(tmp_path):
    """60 steps straight = k steps, kill -9, the same command again: all parameters, moments,
    losses. After a cycle of two epochs, 16 steps, tokens come from the disk. Without a cycle the
    same is `tests/faults/kill_test.py`'s."""
    settings = (
        "--config.run.steps=60",
        "--config.run.checkpoint_every=10",
        "--config.data.augmentation_cycle=2",
    )
    finish(start(tmp_path / "straight", *settings))

    # The run to be killed: as slow as a picture every step makes it, so that the kill lands.
    process = start(tmp_path / "killed", *settings)
    log = tmp_path / "killed/metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= 25:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    before = len(losses(tmp_path / "killed"))
    assert 25 <= before < 60

    output = finish(start(tmp_path / "killed", *settings))
    assert "resumed at step" in output
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    step, straight = saved_state(tmp_path / "straight")
    again, killed = saved_state(tmp_path / "killed")
    assert step == again == 60
    for (path, a), (_, b) in zip(straight, killed, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text())
        for name in ("straight", "killed")
    ]
    assert summaries[0]["loss"] == summaries[1]["loss"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run in this process, on eight simulated devices."""
    workdir = tmp_path_factory.mktemp("pretrain")
    values = tiny.pretrain()
    values.run.steps = 8
    values.run.eval_every = 4
    values.run.picture_every = 4
    values.run.checkpoint_every = 4
    config = jobs.parse_job(values.to_dict())
    return workdir, config, pretrain.run(config, workdir=str(workdir))


@pytest.mark.slow
def test_what_a_run_leaves_behind(finished):
    workdir, _, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    start = json.loads((workdir / "start.json").read_text())
    assert start["token_entropy"] == summary["token_entropy"]
    assert {"jax", "beit_jax"} <= set(start["versions"])
    assert summary["steps"] == 8
    assert summary["chance_loss"] == pytest.approx(np.log(64))
    assert 0 < summary["token_entropy"] <= summary["chance_loss"]
    assert 1 / 64 <= summary["majority_accuracy"] <= 1
    seconds = summary["time_to_first_step"]
    parts = ("data", "statistics", "state", "first batch", "compile", "step")
    assert all(seconds[part] >= 0 for part in parts)
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"])
    picture = np.asarray(Image.open(workdir / "reconstruction.png"))
    assert picture.ndim == 3
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    attention = np.asarray(Image.open(workdir / "attention.png"))
    assert len(np.unique(attention.reshape(-1, 3), axis=0)) > 100
    lines = metrics.read(str(workdir / "metrics.jsonl"))
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8]
    assert all(line["replaced_images"] == 0 for line in lines if "replaced_images" in line)


@pytest.mark.slow
def test_evaluation_alone_agrees_with_the_run(finished, tmp_path, capsys):
    workdir, config, summary = finished
    alone = dataclasses.replace(
        config,
        evaluate_only=True,
        run=dataclasses.replace(config.run, init_from=str(workdir)),
    )
    evaluation = pretrain.run(alone, workdir=str(tmp_path))
    assert evaluation["loss"] == pytest.approx(summary["loss"], rel=1e-6)
    assert evaluation["mlm_acc"] == pytest.approx(summary["accuracy"], abs=1e-6)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == evaluation
    assert "masked tokens right" in capsys.readouterr().out
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.slow
def test_held_out_loss_equals_plain_numpy(finished):
    """Held-out loss and accuracy, recomputed image by image from the checkpoint."""
    from beit_jax.data import pipeline, sources, views

    workdir, config, summary = finished
    model = masked_image_model(config.model, vocabulary=64)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), model.shapes()
    )
    params = checkpoint.restore_params(str(workdir), shapes=shapes)
    tokenizer = open_tokenizer(config.tokenizer)
    tokenizer_params = load_params(config.tokenizer)
    source = sources.open_source(config.data, training=False)
    apply, encode = jax.jit(model.apply), jax.jit(tokenizer.encode)
    total, correct, seen = [], [], 0
    made = views.pretraining_views(config.data, grid=4, keys=("image", "token_image", "mask"))
    for batch in pipeline.eval_batches(source, config=config.data, views=made, batch_size=1):
        assert batch["valid"].all()
        seen += 1
        pixels = batch["image"].astype(np.float32) / 255
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        logits = apply(params, (pixels - mean) / std, mask=batch["mask"])
        ids = np.asarray(encode(tokenizer_params, batch["token_image"])).reshape(-1)
        for position in np.flatnonzero(batch["mask"]):
            row = np.asarray(logits[0, position], np.float64)
            total.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[position]])
            correct.append(row.argmax() == ids[position])
    assert seen == 12
    assert np.mean(total) == pytest.approx(summary["loss"], rel=1e-4)
    assert np.mean(correct) == pytest.approx(summary["accuracy"], abs=1e-6)


def test_token_statistics_by_hand():
    """Entropy and majority over masked tokens of valid images only."""
    tokenizer = Tokenizer(
        vocabulary=4,
        image_size=2,
        grid=2,
        init=None,
        encoding_params=lambda params: params,
        pixel_features=lambda params, pixels: jnp.round(pixels[..., :1] * 255),
        feature_logits=lambda params, features: jax.nn.one_hot(features[..., 0].astype(int), 4),
        pixel_decode=None,
    )
    ids = np.array([[[0, 1], [1, 2]], [[1, 1], [3, 3]], [[0, 0], [0, 0]]], np.uint8)
    batch = {
        "token_image": np.repeat(ids[..., None], 3, axis=-1),
        "mask": np.array([[[1, 1], [1, 1]], [[1, 1], [0, 0]], [[1, 1], [1, 1]]], bool),
        "valid": np.array([True, True, False]),
    }
    statistics = token_statistics(tokenizer, {}, [batch])
    shares = np.array([1, 4, 1]) / 6  # tokens 0, 1 and 2
    assert statistics.entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert statistics.majority_accuracy == pytest.approx(4 / 6)
    assert (statistics.codes_used, statistics.tokens) == (3, 6)
    assert token_statistics(tokenizer, {}, []) is None


def test_flops_of_the_recipes():
    """Published: 107.98 and 372.8 GFLOP for the student with 75 tokens scored, 52.12 for DALL-E."""
    for recipe, student in ((beit_base, 107.98e9), (beit_large, 372.8e9)):
        config = jobs.parse_job(recipe.get_config().to_dict())
        model = masked_image_model(config.model, vocabulary=8192)
        flops = pretrain.flops_per_image(open_tokenizer(config.tokenizer), config=config, slots=75)
        assert flops == pytest.approx(student + 52.12e9, rel=1e-4)
    params = model.shapes()["encoder"]
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    from beit_jax.models.functional import functional
    from beit_jax.models.vit import Encoder

    encoder = functional(
        lambda rngs: Encoder(config.model, mask_token=True, final_norm=True, rngs=rngs)
    )
    counted = matmul_flops(encoder.apply, params, image)
    assert counted == pytest.approx(encoder_flops(config.model), rel=1e-6)


@pytest.mark.slow
def test_real_photographs_at_224(tmp_path):
    """A folder of photographs, DALL-E's architecture with random weights: 20 steps, a kill between,
    a resume."""
    photographs = os.environ.get("BEIT_JAX_IMAGES")
    if not photographs:
        pytest.skip("set BEIT_JAX_IMAGES to a folder of at least 40 photographs")
    settings = (
        f"--config.data.source=folder:{photographs}",
        "--config.data.holdout=8",
        "--config.data.image_size=224",
        "--config.data.token_image_size=112",
        "--config.data.mask.count=75",
        "--config.data.mask.min_block=16",
        "--config.model.image_size=224",
        "--config.model.patch_size=16",
        "--config.tokenizer.kind=dalle",
        "--config.tokenizer.image_size=112",
        "--config.tokenizer.vocabulary=512",
        "--config.tokenizer.width=16",
        "--config.run.steps=20",
        "--config.run.checkpoint_every=4",
    )
    process = start(tmp_path, *settings)
    log = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 9):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    output = finish(start(tmp_path, *settings))
    assert "resumed at step" in output
    assert list(losses(tmp_path)) == list(range(1, 21))
    assert np.isfinite(list(losses(tmp_path).values())).all()
