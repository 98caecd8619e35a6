"""A round trip through a format changes no bit; unilm's names and shapes are the published ones."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from beit_jax.config import ModelConfig
from beit_jax.weights import adapt, convert, foreign, keys
from beit_jax.weights.description import Description, describe, to_config
from beit_jax.weights.formats import FORMATS, timm, unilm
from tests.weights import examples

OUTPUTS = {"hugging_face": "folder", "timm": "file.safetensors", "unilm": "file.pth"}
BASE = ModelConfig.base()
LARGE = ModelConfig.large(layer_scale_init=1e-5)
PUBLISHED = json.loads((pathlib.Path(__file__).parent / "unilm_shapes.json").read_text())


def published(family: str) -> dict[str, tuple[int, ...]]:
    """A family's keys and shapes; the file keeps only block 0, the others are the same."""
    tensors, result = PUBLISHED[family]["tensors"], {}
    block = {key: shape for key, shape in tensors.items() if key.startswith("blocks.0.")}
    for key, shape in tensors.items():
        if key not in block:
            result[key] = tuple(shape)
        elif key == next(iter(block)):
            for i in range(PUBLISHED[family]["layers"]):
                result |= {k.replace("s.0.", f"s.{i}.", 1): tuple(s) for k, s in block.items()}
    return result


def description_of(family: str) -> Description:
    size = LARGE if "large" in family else BASE
    if family.startswith("finetune"):
        _, _, image_size, classes = family.split()
        model = dataclasses.replace(
            size, positions="relative_per_block", image_size=int(image_size)
        )
        return Description(task="classify", model=model, outputs=int(classes))
    if "plain" in family:
        size = dataclasses.replace(size, positions="absolute", layer_scale_init=None)
    return Description(task="pretrain", model=size, outputs=8192)


def shapes_of(description: Description) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in description.shapes().items()}


def same(expected, actual) -> None:
    assert expected.keys() == actual.keys()
    for name in expected:
        assert actual[name].dtype == np.float32
        np.testing.assert_array_equal(expected[name], actual[name], err_msg=name)


@pytest.mark.parametrize("format", ["hugging_face", "unilm"])
@pytest.mark.parametrize("kind", examples.EVERY)
def test_round_trip_is_bit_exact(kind, format, tmp_path):
    if format == "unilm":
        pytest.importorskip("torch", reason="writing .pth takes PyTorch")
    description = examples.EVERY[kind]
    params = examples.saved(tmp_path / "native", description)
    output = str(tmp_path / OUTPUTS[format])
    report = convert.export_checkpoint(
        str(tmp_path / "native"), format=format, output=output
    ).report
    assert set(report.used) == set(params)
    assert report.missing == report.unused == report.reshaped == ()
    report, imported, _ = convert.import_checkpoint(output, output=str(tmp_path / "again"))
    assert report.missing == report.unused == report.reshaped == report.cast == ()
    again, again_description, *_ = convert.read_any(str(tmp_path / "again"))
    same(params, again)
    assert again_description == imported
    # A format may not record every field; these must survive in all of them.
    for field in ("task", "outputs", "pooling"):
        assert getattr(imported, field) == getattr(description, field)
    for field in ("layers", "width", "mlp_width", "image_size", "patch_size", "positions"):
        assert getattr(imported.model, field) == getattr(description.model, field)
    if format == "hugging_face":
        assert imported.model == dataclasses.replace(description.model, dtype="auto")
        assert imported.normalization == description.normalization


@pytest.mark.parametrize("kind", examples.FINE_TUNED)
def test_round_trip_through_timm_is_bit_exact(kind, tmp_path):
    description = examples.FINE_TUNED[kind]
    params = examples.saved(tmp_path / "native", description)
    output = str(tmp_path / "file.safetensors")
    convert.export_checkpoint(str(tmp_path / "native"), format="timm", output=output)
    checkpoint = foreign.read(output)
    same(params, checkpoint.params)
    assert checkpoint.description.model.heads == description.model.heads
    assert checkpoint.description.outputs == description.outputs


@pytest.mark.parametrize("kind", examples.PRETRAINED)
def test_timm_takes_a_pre_trained_encoder_and_names_what_it_leaves(kind, tmp_path):
    description = examples.PRETRAINED[kind]
    params = examples.saved(tmp_path / "native", description)
    output = str(tmp_path / "file.safetensors")
    done = convert.export_checkpoint(str(tmp_path / "native"), format="timm", output=output)
    assert set(done.report.unused) == {"encoder/mask_token", "lm_head/kernel", "lm_head/bias"}
    again = foreign.read(output).params
    if kind == "beit+":
        table = params.pop(adapt.SHARED_TABLE)
        params[adapt.BLOCK_TABLE] = np.stack([table] * description.model.layers)
    for name in done.report.unused:
        del params[name]
    same(params, again)


@pytest.mark.parametrize("family", PUBLISHED)
def test_unilm_names_shapes_and_order_are_the_published_ones(family):
    description = description_of(family)
    state = {
        key: np.broadcast_to(np.float32(0), shape)
        for key, shape in keys.foreign_shapes(shapes_of(description), unilm.TABLE).items()
    }
    state = unilm.with_index_buffers(state, grid=description.model.grid)
    expected = published(family)
    assert {key: array.shape for key, array in state.items()} == expected
    assert list(state) == list(expected)
    for key, array in state.items():
        assert array.dtype == (np.int64 if key.endswith("index") else np.float32)


@pytest.mark.parametrize("family", [f for f in PUBLISHED if "224" in f])
@pytest.mark.parametrize("format", ["hugging_face", "timm", "unilm"])
def test_every_parameter_of_base_and_large_has_its_own_key(family, format):
    """Both sides have the same count of numbers, and every key leads back to its parameter."""
    description = description_of(family)
    shapes = shapes_of(description)
    if format == "timm":
        empty = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        reduced, description, _ = timm.reduce(empty, description)
        shapes = {name: array.shape for name, array in reduced.items()}
        assert shapes == shapes_of(description)
    table = FORMATS[format].reader.table(description)
    foreign = keys.foreign_shapes(shapes, table)
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert sum(int(np.prod(shape)) for shape in foreign.values()) == count
    rows = [row for row in table if all(path in shapes for path in row.native)]
    back = [path for row in rows for path in row.native]
    assert sorted(back) == sorted(shapes)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["hugging_face", "timm", "unilm"])
@pytest.mark.parametrize("plain", [False, True])
def test_base_round_trip_with_every_number_different(format, plain):
    """In memory: a matrix has no two equal numbers, so that an exchange of any two would show."""
    model = BASE
    if plain:
        model = dataclasses.replace(model, positions="absolute", layer_scale_init=None)
    description = Description(task="pretrain", model=model, outputs=8192)
    params = {
        # Neighbouring bit patterns from 1.0 on; whole numbers would run out at 2**24.
        name: (np.arange(np.prod(shape), dtype=np.uint32) + 0x3F800000)
        .view(np.float32)
        .reshape(shape)
        for name, shape in shapes_of(description).items()
    }
    if format == "timm":
        params, description, _ = timm.reduce(params, description)
    table = FORMATS[format].reader.table(description)
    state = keys.to_foreign(params, table)
    same(params, keys.to_native(state, table, layers=12))


def test_a_saved_config_describes_its_checkpoint():
    for description in examples.EVERY.values():
        assert describe(json.loads(json.dumps(to_config(description)))) == description


def test_fused_rows_are_query_key_value():
    """Literally: rows of qkv.weight are [Q | K | V], transposed to (in, out)."""
    weight = np.arange(12.0).reshape(6, 2)
    query, key, value = keys.FUSED_QKV.to_native(weight)
    np.testing.assert_array_equal(query, [[0, 2], [1, 3]])
    np.testing.assert_array_equal(key, [[4, 6], [5, 7]])
    np.testing.assert_array_equal(value, [[8, 10], [9, 11]])
    np.testing.assert_array_equal(keys.FUSED_QKV.to_foreign(query, key, value), weight)


def test_a_parameter_without_a_key_is_an_error():
    params = examples.random_params(examples.PRETRAINED["beit+"])
    params["encoder/blocks/attention/key/bias"] = np.zeros((3, 32), np.float32)
    with pytest.raises(ValueError, match="no key for encoder/blocks/attention/key/bias"):
        keys.to_foreign(params, unilm.TABLE)
