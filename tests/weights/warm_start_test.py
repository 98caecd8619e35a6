"""`config.run.init_from`: which checkpoints start which models, and which names may differ."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from beit_jax.config import ConfigError, OptimizerConfig, RunConfig
from beit_jax.models.functional import flatten, unflatten
from beit_jax.models.heads import classifier, masked_image_model
from beit_jax.training import loop, optim, sharding
from beit_jax.training.checkpoint import Checkpoints, restore_params
from beit_jax.training.state import Task, state_from_params, state_shapes
from beit_jax.weights import adapt, convert, native, resize
from beit_jax.weights.description import Description, to_config
from tests.compiling import EIGHT_DEVICES, QUICKLY
from tests.weights import examples

PRETRAINED = examples.PRETRAINED["beit+"]
CLASSES = 6
FRESH = 0.25
# The names that differ between a pre-trained model and a classifier.
ALLOW = {
    "allow_missing": ("fc_norm", "head"),
    "allow_unused": ("encoder/mask_token", "encoder/norm", "lm_head"),
}


def fine_tuning(image_size: int = 40):
    """A classifier with per-block tables, at a resolution."""
    model = dataclasses.replace(examples.PER_BLOCK, image_size=image_size)
    return classifier(model, classes=CLASSES)


def with_shardings(shapes):
    """Shapes with the shardings of a mesh, as the train loop passes them."""
    mesh = sharding.make_mesh(fsdp=1)
    return jax.tree.map(
        lambda leaf, split: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split),
        shapes,
        sharding.shardings(shapes, mesh),
    )


def fresh(shapes):
    """Newly drawn parameters, every number of which is `FRESH`."""
    return jax.tree.map(
        lambda leaf: jax.device_put(np.full(leaf.shape, FRESH, leaf.dtype), leaf.sharding), shapes
    )


def start(source, model, **more):
    """Flat parameters from `source` for `model`."""
    shapes = with_shardings(model.shapes())
    restored = restore_params(str(source), shapes=shapes, fresh=lambda: fresh(shapes), **more)
    assert jax.tree.structure(restored) == jax.tree.structure(shapes)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(shapes), strict=True):
        assert leaf.shape == wanted.shape
        assert leaf.sharding == wanted.sharding
    return {name: np.asarray(leaf) for name, leaf in flatten(restored).items()}


@pytest.fixture(scope="module", params=["native", "hugging_face", "timm", "unilm"])
def source(request, tmp_path_factory):
    """A pre-trained checkpoint in every format, and its parameters."""
    if request.param == "unilm":
        pytest.importorskip("torch", reason="writing .pth takes PyTorch")
    folder = tmp_path_factory.mktemp(request.param)
    params = examples.saved(folder / "native", PRETRAINED)
    if request.param == "native":
        return folder / "native", params
    name = {"hugging_face": "folder", "timm": "x.safetensors", "unilm": "x.pth"}[request.param]
    convert.export_checkpoint(
        str(folder / "native"), format=request.param, output=str(folder / name)
    )
    return folder / name, params


def test_the_same_model_starts_with_exactly_these_weights(source):
    path, params = source
    if str(path).endswith(".safetensors"):
        pytest.skip("timm has no head for visual tokens")
    model = masked_image_model(PRETRAINED.model, vocabulary=PRETRAINED.outputs)
    restored = start(path, model)
    for name, value in params.items():
        np.testing.assert_array_equal(restored[name], value, err_msg=name)


@pytest.mark.parametrize("image_size", [40, 56])
def test_fine_tuning_starts_from_pre_training(source, image_size):
    """Tables are copied and resized, the final norm is dropped, the head is new, the rest kept."""
    path, params = source
    model = fine_tuning(image_size)
    restored = start(path, model, **ALLOW)
    table = resize.resize_table(params[adapt.SHARED_TABLE], grid=image_size // 8)
    for block in restored[adapt.BLOCK_TABLE]:
        np.testing.assert_allclose(block, table, rtol=0, atol=1e-6)
    for name, value in restored.items():
        if name.startswith(("fc_norm", "head")):
            assert (value == FRESH).all(), name
        elif name != adapt.BLOCK_TABLE:
            np.testing.assert_array_equal(value, params[name], err_msg=name)


def test_only_allowed_names_may_be_missing_or_left_over(source):
    path, _ = source
    model = fine_tuning()
    with pytest.raises(ConfigError, match=r"^config.run.init_from: .* does not fit: ") as error:
        start(path, model)
    text = str(error.value)
    assert "missing fc_norm/bias, fc_norm/scale, head/bias, head/kernel" in text
    assert "encoder/norm/bias" in text
    assert "init_allow_missing" in text
    assert "instead of" not in text  # only names differ, not the kind of encoder
    with pytest.raises(ConfigError, match="fit: missing head/bias, head/kernel") as error:
        start(path, model, allow_missing=("fc_norm",), allow_unused=("encoder/norm",))
    assert "fc_norm" not in str(error.value)


def test_absolute_positions_change_their_resolution(tmp_path):
    description = examples.PRETRAINED["plain"]
    params = examples.saved(tmp_path / "native", description)
    model = classifier(dataclasses.replace(examples.PLAIN, image_size=64), classes=CLASSES)
    restored = start(tmp_path / "native", model, **ALLOW)
    expected = resize.resize_positions(params["encoder/pos_embed"], grid=8)
    np.testing.assert_array_equal(restored["encoder/pos_embed"], expected)


def test_a_head_for_other_classes_is_dropped_only_if_named(tmp_path):
    params = examples.saved(tmp_path / "native", examples.FINE_TUNED["mean"])
    with pytest.raises(ConfigError, match="head is for 5 classes, needed 6; to start it anew"):
        start(tmp_path / "native", fine_tuning())
    restored = start(
        tmp_path / "native", fine_tuning(), allow_missing=("head",), allow_unused=("head",)
    )
    np.testing.assert_array_equal(restored["fc_norm/scale"], params["fc_norm/scale"])
    assert restored["head/kernel"].shape == (32, 6)


def test_another_vocabulary_is_its_own_error(source):
    path, _ = source
    if str(path).endswith(".safetensors"):
        pytest.skip("timm has no head for visual tokens")
    model = masked_image_model(PRETRAINED.model, vocabulary=64)
    with pytest.raises(ConfigError, match=r"lm_head is for 40 tokens \(vocabulary\), needed 64"):
        start(path, model)


def test_another_architecture_is_its_own_error(source):
    path, _ = source
    larger = dataclasses.replace(PRETRAINED.model, layers=4, width=64)
    with pytest.raises(ConfigError, match="another architecture: width 32 instead of 64, layers 3"):
        start(path, masked_image_model(larger, vocabulary=40))
    plain = masked_image_model(examples.PLAIN, vocabulary=40)
    with pytest.raises(ConfigError, match=r"missing .*encoder/pos_embed") as caught:
        start(path, plain)
    assert re.search(
        r"; it has relative_\w+ positions instead of absolute positions and LayerScale instead of"
        r" no LayerScale \(allow",
        str(caught.value),
    )


def test_a_source_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"^config.run.init_from: no checkpoint in /nowhere"):
        start("/nowhere", fine_tuning())
    with pytest.raises(ConfigError, match=r"^config.run.init_from: /x.pth does not exist"):
        start("/x.pth", fine_tuning())


def test_an_import_does_not_replace_other_files(tmp_path):
    examples.saved(tmp_path / "native", PRETRAINED)
    convert.export_checkpoint(
        str(tmp_path / "native"), format="timm", output=str(tmp_path / "x.safetensors")
    )
    with pytest.raises(ConfigError, match="holds other files"):
        convert.import_checkpoint(str(tmp_path / "x.safetensors"), output=str(tmp_path))
    convert.import_checkpoint(str(tmp_path / "x.safetensors"), output=str(tmp_path / "native"))
    assert convert.read_any(str(tmp_path / "native"))[1].task == "encoder"


def test_an_imported_checkpoint_is_taken_too(source, tmp_path):
    path, params = source
    if not native.is_checkpoint(str(path)):
        convert.import_checkpoint(
            str(path), output=str(tmp_path / "imported"), image_size=56, per_block=True
        )
        restored = start(tmp_path / "imported", fine_tuning(56), **ALLOW)
        table = resize.resize_table(params[adapt.SHARED_TABLE], grid=7)
        for block in restored[adapt.BLOCK_TABLE]:
            np.testing.assert_allclose(block, table, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_train_loop_starts_from_a_foreign_checkpoint(tmp_path):
    """The loop restores it with a new optimizer and step 0."""
    params = examples.saved(tmp_path / "native", PRETRAINED)
    convert.export_checkpoint(
        str(tmp_path / "native"), format="hugging_face", output=str(tmp_path / "peer")
    )
    model = fine_tuning()
    task = Task(
        init=model.init,
        prepare=None,
        loss=None,
        evaluate=None,
        metrics=None,
        frozen={},
        flops_per_image=0.0,
    )
    run = RunConfig(
        steps=1,
        batch_size=1,
        init_from=str(tmp_path / "peer"),
        init_allow_missing=ALLOW["allow_missing"],
        init_allow_unused=ALLOW["allow_unused"],
    )
    optimizer = optim.adamw(OptimizerConfig(learning_rate=1.0, warmup_steps=0))
    shapes = state_shapes(task, optimizer, sharding.make_mesh(fsdp=1))
    checkpoints = Checkpoints(str(tmp_path / "run"), run=run, config={})
    state = loop.restore_or_init(task, optimizer, checkpoints, shapes=shapes, run=run)
    checkpoints.close()
    assert int(state.step) == 0
    np.testing.assert_array_equal(state.params["encoder"]["cls_token"], params["encoder/cls_token"])
    assert float(np.abs(state.params["head"]["kernel"]).max()) < 0.001 * 0.02 * 6


MANY_DEVICES = """
import json, sys
import jax
from jax.sharding import NamedSharding
from beit_jax.config import OptimizerConfig, RunConfig
from beit_jax.training import optim, sharding
from beit_jax.training.checkpoint import Checkpoints
from beit_jax.training.state import state_from_params
from beit_jax.weights.description import to_config
from beit_jax.models.functional import unflatten
from tests.weights import examples

description = examples.PRETRAINED["beit+"]
params = unflatten(examples.random_params(description))
optimizer = optim.adamw(OptimizerConfig(learning_rate=1.0, warmup_steps=0))
state = state_from_params(params, optimizer=optimizer)
mesh = sharding.make_mesh(fsdp=4)
state = jax.device_put(state, sharding.shardings(state, mesh))
kernel = state.params["lm_head"]["kernel"]
assert jax.device_count() == 8 and len(kernel.sharding.device_set) == 8
assert kernel.addressable_shards[0].data.shape == (32, 10)
run = RunConfig(steps=3, batch_size=8, fsdp=4)
checkpoints = Checkpoints(sys.argv[1], run=run, config=to_config(description))
checkpoints.save(state, step=3)
checkpoints.close()
"""


def run_python(*arguments, **environment) -> None:
    result = subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_is_exported_on_one(tmp_path):
    """It was sharded over eight devices with its optimizer; the export reads its folder alone."""
    workdir = tmp_path / "run"
    environment = {"XLA_FLAGS": EIGHT_DEVICES, "JAX_PLATFORMS": "cpu"}
    run_python("-c", MANY_DEVICES, workdir, **environment)
    moved = tmp_path / "moved"
    workdir.rename(moved)
    export = ("export", moved, "--format", "hugging_face", "--output", tmp_path / "hf")
    run_python("-m", "beit_jax.weights", *export, XLA_FLAGS=QUICKLY, JAX_PLATFORMS="cpu")
    params, description, *_ = convert.read_any(str(tmp_path / "hf"))
    expected = examples.random_params(PRETRAINED)
    assert params.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(params[name], expected[name])
    assert description.outputs == 40


def test_export_of_a_run_takes_the_newest_checkpoint_and_its_numbers(tmp_path):
    """A run's directory as the train loop leaves it: `checkpoints/<step>`, summary, metrics."""
    from beit_jax.config import DataConfig, MaskConfig, to_dict
    from beit_jax.tasks.pretrain import PretrainConfig
    from beit_jax.tokenizers.dalle import DalleConfig

    config = PretrainConfig(
        run=RunConfig(steps=20, batch_size=4),
        model=PRETRAINED.model,
        tokenizer=DalleConfig(random_weights=True, vocabulary=40, image_size=40, width=8),
        data=DataConfig(
            source="folder:/pictures",
            image_size=40,
            token_image_size=40,
            normalization="imagenet",
            mask=MaskConfig(count=9, min_block=4),
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=5),
    )
    optimizer = optim.adamw(config.optimizer)
    checkpoints = Checkpoints(str(tmp_path / "run"), run=config.run, config=to_dict(config))
    for step, seed in ((10, 1), (20, 2)):
        params = unflatten(examples.random_params(PRETRAINED, seed))
        checkpoints.save(state_from_params(params, optimizer=optimizer), step=step)
    checkpoints.close()
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"steps": 20, "accuracy": 0.1234}))
    done = convert.export_checkpoint(
        str(tmp_path / "run"), format="hugging_face", output=str(tmp_path / "hf")
    )
    assert "BeitForMaskedImageModeling.from_pretrained" in done.load
    params, description, *_ = convert.read_any(str(tmp_path / "hf"))
    newest = examples.random_params(PRETRAINED, 2)
    np.testing.assert_array_equal(params["lm_head/kernel"], newest["lm_head/kernel"])
    assert description.normalization == "imagenet"
    card = (tmp_path / "hf" / "README.md").read_text()
    for fact in ("folder:/pictures", "0.0015", "| accuracy | 0.1234 |", "RANDOM weights"):
        assert fact in card
    assert "| step | 20 |" in card
    older = convert.read_any(str(tmp_path / "run" / "checkpoints" / "10"))[0]
    expected = examples.random_params(PRETRAINED, 1)
    np.testing.assert_array_equal(older["lm_head/kernel"], expected["lm_head/kernel"])


def test_the_numbers_of_a_checkpoint_are_those_of_its_step(tmp_path):
    """Exported while the run goes on, or an older one: its card showed the newest numbers."""
    run = tmp_path / "run"
    for name in ("10", "20"):
        for item in ("state", "config"):
            (run / "checkpoints" / name / item).mkdir(parents=True)
    (run / "best" / "checkpoints" / "10" / "state").mkdir(parents=True)
    (run / "best" / "checkpoints" / "10" / "config").mkdir()
    lines = [
        {"step": 10, "loss": 3.0, "images_per_second": 9.0},
        {"step": 10, "eval_loss": 2.5, "eval_top1": 0.0},
        {"step": 20, "loss": 2.0},
        {"step": 25, "loss": 1.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert native.saved_metrics(str(run)) == {"step": 20, "loss": 2.0}
    at_10 = {"step": 10, "loss": 3.0, "eval_loss": 2.5, "eval_top1": 0.0}
    assert native.saved_metrics(str(run / "checkpoints" / "10")) == at_10
    assert native.saved_metrics(str(run / "best")) == at_10
    summary = {"steps": 20, "top1": 0.5, "best": {"value": 0.5}, "seconds": 7.0}
    (run / "summary.json").write_text(json.dumps(summary))
    assert native.saved_metrics(str(run)) == {"step": 20, "top1": 0.5}
    assert native.saved_metrics(str(run / "checkpoints" / "10")) == at_10
    assert native.saved_metrics(str(tmp_path)) == {}


def test_a_key_that_export_needs_in_the_config_is_named(tmp_path):
    config = to_config(PRETRAINED)
    del config["data"]
    native.write_params(
        str(tmp_path / "native"), unflatten(examples.random_params(PRETRAINED)), config=config
    )
    with pytest.raises(ConfigError, match="data: missing from the checkpoint's config"):
        convert.export_checkpoint(
            str(tmp_path / "native"), format="hugging_face", output=str(tmp_path / "x")
        )


def test_parameters_that_contradict_the_config_are_an_error(tmp_path):
    other = Description(task="pretrain", model=examples.PER_BLOCK, outputs=40)
    native.write_params(
        str(tmp_path / "native"),
        unflatten(examples.random_params(PRETRAINED)),
        config=to_config(other),
    )
    with pytest.raises(ConfigError, match=f"unused {adapt.SHARED_TABLE}"):
        convert.export_checkpoint(
            str(tmp_path / "native"), format="hugging_face", output=str(tmp_path / "x")
        )
