"""Tokenizer files: what is written is read back, and every wrong file is one clear line."""

import dataclasses
import functools
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from beit_jax import load_tokenizer
from beit_jax.config import ConfigError, TokenizerConfig, parse
from beit_jax.models.functional import flatten
from beit_jax.tokenizers.dalle import DalleConfig
from beit_jax.tokenizers.dvae import DvaeConfig
from beit_jax.tokenizers.kinds import BY_KIND
from beit_jax.tokenizers.loading import (
    TokenizerFileError,
    load_params,
    open_tokenizer,
    save_params,
)

DALLE = DalleConfig(width=8, vocabulary=32, image_size=32)
DVAE = DvaeConfig(width=8, vocabulary=32, image_size=32, levels=2, codebook_width=12)
METADATA = {"kind": "dvae", "vocabulary": 32, "width": 8, "levels": 2, "codebook_width": 12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """What a job's config has."""

    tokenizer: Annotated[TokenizerConfig, BY_KIND]


@functools.cache
def drawn(config) -> dict:
    """Random params of a tokenizer, from numpy: quicker than compiling `init`."""
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(open_tokenizer(config).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)


@pytest.fixture(params=[DALLE, DVAE], ids=["dalle", "dvae"])
def config(request):
    return request.param


@pytest.fixture
def saved(config, tmp_path):
    """(config with a path, the params in the file at that path)."""
    path = tmp_path / "folder" / "tokenizer.safetensors"
    params = drawn(config)
    save_params(path, params, config=config)
    return dataclasses.replace(config, path=str(path)), params


@pytest.fixture
def dvae_file(tmp_path):
    """Writes a file of given tensors and metadata; gives the config that reads it."""

    def write(change=lambda tensors: tensors, metadata=METADATA):
        tensors = flatten(drawn(DVAE))
        path = tmp_path / "tokenizer.safetensors"
        header = {} if metadata is None else {"tokenizer": json.dumps(metadata)}
        path.write_bytes(safetensors.numpy.save(change(tensors), metadata=header))
        return dataclasses.replace(DVAE, path=str(path))

    return write


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_interface(config):
    """bytes -> ids -> pictures, for both kinds alike and under jit."""
    tokenizer = open_tokenizer(config)
    params = drawn(config)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    ids = jax.jit(tokenizer.encode)(params, images)
    assert tokenizer.vocabulary == 32
    assert tokenizer.image_size == 32
    assert tokenizer.grid == 32 // config.stride
    assert ids.shape == (3, tokenizer.grid, tokenizer.grid)
    assert ids.dtype == jnp.int32
    assert 0 <= int(ids.min()) <= int(ids.max()) < 32
    logits = jax.jit(tokenizer.logits)(params, images)
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(ids, jnp.argmax(logits, axis=-1))
    pictures = jax.jit(tokenizer.decode)(params, ids)
    assert pictures.shape == images.shape
    assert pictures.dtype == jnp.float32
    assert 0 <= float(pictures.min()) < float(pictures.max()) <= 1


def test_each_image_is_encoded_by_itself(config):
    tokenizer = open_tokenizer(config)
    params = drawn(config)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    logits = jax.jit(tokenizer.logits)
    np.testing.assert_allclose(
        logits(params, images)[1:], logits(params, images[1:]), rtol=1e-4, atol=1e-5
    )


def test_images_of_another_size_or_type_are_refused(config):
    tokenizer = open_tokenizer(config)
    params = drawn(config)
    with pytest.raises(ValueError, match=r"takes uint8 \[batch, 32, 32, 3\], got uint8 \[1, 40"):
        tokenizer.encode(params, np.zeros((1, 40, 40, 3), np.uint8))
    with pytest.raises(ValueError, match="got float32"):
        tokenizer.encode(params, np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="decode takes integers"):
        tokenizer.decode(params, np.zeros((1, 4), np.int32))


def test_an_id_outside_the_vocabulary_shows(config):
    """Not silently another token's picture."""
    tokenizer = open_tokenizer(config)
    params = drawn(config)
    ids = jnp.full((1, tokenizer.grid, tokenizer.grid), 32)
    assert bool(jnp.isnan(jax.jit(tokenizer.decode)(params, ids)).all())


def test_saved_params_are_read_back_exactly(saved):
    config, params = saved
    loaded = load_params(config)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded))


def test_saving_replaces_the_file_and_leaves_no_other(saved, tmp_path):
    config, params = saved
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    save_params(config.path, doubled, config=config)
    jax.tree.map(np.testing.assert_array_equal, load_params(config), doubled)
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["tokenizer.safetensors"]


def test_a_failed_save_keeps_the_old_file(saved, tmp_path, monkeypatch):
    config, params = saved
    from etils import epath

    def fail(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(type(epath.Path("x")), "write_bytes", fail)
        with pytest.raises(OSError, match="disk full"):
            save_params(config.path, jax.tree.map(np.zeros_like, params), config=config)
    jax.tree.map(np.testing.assert_array_equal, load_params(config), params)
    assert [file.name for file in (tmp_path / "folder").iterdir()] == ["tokenizer.safetensors"]


def test_params_that_do_not_fit_are_not_saved(config, tmp_path):
    params = drawn(config)
    wider = dataclasses.replace(config, vocabulary=64)
    with pytest.raises(TokenizerFileError, match="instead of"):
        save_params(tmp_path / "tokenizer.safetensors", params, config=wider)
    assert not list(tmp_path.iterdir())


def test_settings_that_are_not_the_networks_may_differ(saved):
    config, _ = saved
    load_params(dataclasses.replace(config, image_size=64, dtype="bfloat16"))


def test_dotted_names_and_half_precision_are_read_too(dvae_file):
    def change(tensors):
        return {key.replace("/", "."): leaf.astype(np.float16) for key, leaf in tensors.items()}

    loaded = load_params(dvae_file(change))
    assert loaded["encoder"]["level_1"]["resample"]["kernel"].dtype == np.float32


def test_a_dalle_file_without_decoder_encodes_only(tmp_path):
    tokenizer = open_tokenizer(DALLE)
    params = drawn(DALLE)
    config = dataclasses.replace(DALLE, path=str(tmp_path / "encoder.safetensors"))
    save_params(config.path, {"encoder": params["encoder"]}, config=config)
    loaded = load_params(config)
    assert set(loaded) == {"encoder"}
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    encode = jax.jit(tokenizer.encode)
    ids = encode(loaded, images)
    np.testing.assert_array_equal(ids, encode(params, images))
    with pytest.raises(ValueError, match="no decoder weights") as error:
        tokenizer.decode(loaded, ids)
    assert "decoder.pkl" in one_line(error)


def test_random_weights_are_always_the_same_and_warned_of(caplog):
    config = DvaeConfig(width=4, vocabulary=8, codebook_width=4, levels=1, random_weights=True)
    with caplog.at_level("WARNING"):
        first = load_params(config, name="config.tokenizer")
    assert "config.tokenizer.random_weights is set" in caplog.text
    assert "ids mean nothing" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, first, load_params(config))


def test_no_path(config):
    with pytest.raises(ConfigError, match=r"^config.tokenizer.path: empty; ") as error:
        load_params(config)
    one_line(error)


def test_missing_dalle_file_says_how_to_get_it():
    config = dataclasses.replace(DALLE, path="/nowhere/dalle.safetensors")
    with pytest.raises(FileNotFoundError, match=r"^config.tokenizer.path: /nowhere") as error:
        load_params(config)
    text = one_line(error)
    assert "wget -O encoder.pkl https://cdn.openai.com/dall-e/encoder.pkl" in text
    assert "python -m beit_jax.weights convert-tokenizer" in text
    assert "configs/dvae.py" in text


def test_missing_dvae_file_says_how_to_train_one():
    with pytest.raises(FileNotFoundError, match=r"configs/dvae\.py") as error:
        load_params(dataclasses.replace(DVAE, path="/nowhere/dvae.safetensors"))
    one_line(error)


def test_a_folder(tmp_path):
    with pytest.raises(TokenizerFileError, match="is a folder"):
        load_params(dataclasses.replace(DVAE, path=str(tmp_path)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html><body>404 Not Found</body></html>",
        struct.pack("<Q", 10) + b"{}",
        struct.pack("<Q", 2) + b"[]",
    ],
    ids=["empty", "text", "short", "list"],
)
def test_a_file_that_is_not_safetensors(tmp_path, content):
    path = tmp_path / "tokenizer.safetensors"
    path.write_bytes(content)
    with pytest.raises(TokenizerFileError, match="is not a whole safetensors file") as error:
        load_params(dataclasses.replace(DVAE, path=str(path)))
    assert str(path) in one_line(error)


def test_a_truncated_file(saved):
    config, _ = saved
    with open(config.path, "rb+") as file:
        file.truncate(1_000_000 if config.kind == "dalle" else 5_000)
    with pytest.raises(TokenizerFileError, match="is not a whole safetensors file"):
        load_params(config)


@pytest.mark.parametrize(
    ("where", "bit"),
    [
        ("number", 3),
        ("encoder/", 0),  # of a name
        ("image_size", 1),  # of a setting's name
        ("32", 0),  # of a setting that is not compared with the config's
        ("digest", 13 * 8),  # one of its digits
    ],
)
def test_a_flipped_bit_is_noticed(tmp_path, where, bit):
    path = tmp_path / "tokenizer.safetensors"
    save_params(path, drawn(DVAE), config=DVAE)
    content = bytearray(path.read_bytes())
    start = len(content) - 100
    if where == "32":
        start = content.index(b'image_size\\": 32') + len(b'image_size\\": ')
    elif where != "number":
        start = content.index(where.encode())
    content[start + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    with pytest.raises(TokenizerFileError, match="is damaged: its numbers or settings") as error:
        load_params(dataclasses.replace(DVAE, path=str(path)))
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("BF16", [1], 2), ("F8_E4M3", [1], 1), ("F32", [0, 2**62, 2**62], 0), ("F32", [0] * 80, 0)],
    ids=["bfloat16", "8 bits", "huge", "80 dimensions"],
)
def test_a_tensor_that_numpy_does_not_have_is_one_line(tmp_path, dtype, shape, size):
    path = tmp_path / "t.safetensors"
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    header = {"__metadata__": {"tokenizer": json.dumps(METADATA)}, "a": tensor}
    content = json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + bytes(size))
    with pytest.raises(TokenizerFileError, match="type or shape that is not read") as error:
        load_params(dataclasses.replace(DVAE, path=str(path)))
    one_line(error)


def test_a_pickle_is_told_to_be_converted(tmp_path):
    path = tmp_path / "encoder.pkl"
    path.write_bytes(pickle.dumps(list(range(1000)), protocol=2))
    with pytest.raises(TokenizerFileError, match="convert it first"):
        load_params(dataclasses.replace(DALLE, path=str(path)))


@pytest.mark.parametrize(
    "metadata",
    [None, {}, *({"tokenizer": text} for text in ("", "{", "[1]", '"x"', "[" * 100_000))],
    ids=["none", "empty", "no text", "no JSON", "a list", "a string", "deep"],
)
def test_metadata_of_something_else_is_one_line(tmp_path, metadata):
    """Whoever wrote the file; both the settings' reader and the library's."""
    path = tmp_path / "x.safetensors"
    header = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(TokenizerFileError, match="not one of a tokenizer") as error:
        load_params(dataclasses.replace(DVAE, path=str(path)))
    one_line(error)
    with pytest.raises(TokenizerFileError, match="does not say which tokenizer") as error:
        load_tokenizer(path)
    one_line(error)


def test_a_safetensors_file_of_something_else(dvae_file):
    with pytest.raises(TokenizerFileError, match="not one of a tokenizer") as error:
        load_params(dvae_file(metadata=None))
    one_line(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [("vocabulary", 64), ("width", 16), ("levels", 3), ("codebook_width", 24)],
)
def test_a_file_made_with_other_settings(dvae_file, key, value):
    config = dataclasses.replace(dvae_file(), **{key: value})
    with pytest.raises(TokenizerFileError, match=f"^config.tokenizer.{key}: {value}, but") as error:
        load_params(config)
    assert f"was made with {getattr(DVAE, key)}" in one_line(error)


def test_a_file_of_the_other_kind(dvae_file):
    config = dataclasses.replace(DALLE, path=dvae_file().path)
    with pytest.raises(TokenizerFileError, match=r"config.tokenizer.kind: 'dalle', but .* 'dvae'"):
        load_params(config)


@pytest.mark.parametrize(
    ("tokenizer", "flags"),
    [
        (DALLE, "kind=dvae image_size=16 levels=2 codebook_width=12"),
        (
            dataclasses.replace(DVAE, width=16, levels=3, vocabulary=64),
            "vocabulary=32 image_size=16 width=8 levels=2",
        ),
    ],
    ids=["another kind", "other sizes"],
)
def test_one_error_has_all_flags_that_a_file_needs(dvae_file, tokenizer, flags):
    """Copied to the command line they fit; the number of tokens, which the model wants, stays."""
    config = dataclasses.replace(tokenizer, path=dvae_file().path)
    with pytest.raises(TokenizerFileError) as error:
        load_params(config)
    named = [f"--config.tokenizer.{flag}" for flag in flags.split()]
    assert one_line(error).endswith("; set " + " ".join(named))

    values = {"kind": "dalle", "levels": 3, "codebook_width": 512, **dataclasses.asdict(config)}
    for flag in flags.split():
        key, value = flag.split("=")
        values[key] = value if key == "kind" else int(value)
    fitting = parse(Section, {"tokenizer": values}).tokenizer
    assert fitting.grid == config.grid
    load_params(fitting)


def test_settings_of_the_kind_that_is_left_go_back_to_their_defaults(tmp_path):
    """A setting that has no effect would be refused by the next try."""
    path = str(tmp_path / "dalle.safetensors")
    save_params(path, drawn(DALLE), config=DALLE)
    with pytest.raises(TokenizerFileError) as error:
        load_params(dataclasses.replace(DVAE, path=path))
    for flag in ("kind=dalle", "levels=3", "codebook_width=512", "image_size=64"):
        assert f"--config.tokenizer.{flag}" in one_line(error)


def test_no_flags_where_the_file_says_too_little(dvae_file):
    metadata = {"kind": "dvae", "vocabulary": 32, "width": "x" * 1000}
    with pytest.raises(TokenizerFileError, match=r"levels, codebook_width differ too$") as error:
        load_params(dvae_file(metadata=metadata))
    assert len(one_line(error)) < 400


@pytest.mark.parametrize("address", ["https://host/t.safetensors", "s3://bucket/t", "file:///t"])
def test_an_address_that_is_not_read_is_one_line(address):
    with pytest.raises(TokenizerFileError, match="download it first") as error:
        load_params(dataclasses.replace(DVAE, path=address))
    one_line(error)


def test_neither_a_pipe_nor_a_device_is_read(tmp_path):
    """A pipe waits for a writer, and /dev/zero has no end."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (str(pipe), "/dev/zero"):
        with pytest.raises(TokenizerFileError, match="not a regular file") as error:
            load_params(dataclasses.replace(DVAE, path=path))
        one_line(error)


def test_a_file_larger_than_the_memory_is_not_read(tmp_path):
    path = tmp_path / "sparse.safetensors"
    path.touch()
    os.truncate(path, 1 << 42)
    with pytest.raises(TokenizerFileError, match="more than this machine has memory"):
        load_params(dataclasses.replace(DVAE, path=str(path)))


@pytest.mark.parametrize(
    "bad",
    [np.float32(np.nan), np.float32(np.inf), np.float64(1e300)],
    ids=["NaN", "infinity", "too large for float32"],
)
def test_numbers_that_are_none_are_refused(dvae_file, bad):
    """Every token would be the first of them."""

    def change(tensors):
        changed = tensors["codebook"].astype(bad.dtype)
        changed[0, 0] = bad
        return tensors | {"codebook": changed}

    with pytest.raises(TokenizerFileError, match="codebook holds NaN or numbers") as error:
        load_params(dvae_file(change))
    one_line(error)


@pytest.mark.parametrize("name", ["x\n03:00 step 7", "x" * 100_000])
def test_a_tensors_name_is_quoted_short_and_on_one_line(dvae_file, name):
    with pytest.raises(TokenizerFileError, match="is unexpected") as error:
        load_params(dvae_file(lambda tensors: tensors | {name: np.zeros(1, np.float32)}))
    assert len(one_line(error)) < 400


def test_a_tensor_under_two_names_is_refused(dvae_file):
    """Which of them counted would depend on the order in the file."""
    twin = {"decoder.output.bias": np.zeros(3, np.float32)}
    with pytest.raises(TokenizerFileError, match="one tensor under two names"):
        load_params(dvae_file(lambda tensors: tensors | twin))


def test_tensors_that_do_not_fit_are_all_named(dvae_file):
    def change(tensors):
        tensors["extra/bias"] = tensors.pop("decoder/output/bias")
        tensors["codebook"] = tensors["codebook"].T.copy()
        tensors["encoder/output/bias"] = tensors["encoder/output/bias"].astype(np.int32)
        return tensors

    with pytest.raises(TokenizerFileError) as error:
        load_params(dvae_file(change))
    text = one_line(error)
    assert "decoder/output/bias is missing" in text
    assert "extra/bias is unexpected" in text
    assert "codebook is [12, 32] instead of [32, 12]" in text
    assert "encoder/output/bias is int32 instead of a float" in text


def test_a_dvae_without_decoder_is_incomplete(dvae_file):
    def change(tensors):
        return {key: leaf for key, leaf in tensors.items() if not key.startswith("decoder")}

    with pytest.raises(TokenizerFileError, match=r"decoder/\S+ is missing.*and \d+ more"):
        load_params(dvae_file(change))


def test_checksum(saved):
    config, _ = saved
    with open(config.path, "rb") as file:
        right = hashlib.sha256(file.read()).hexdigest()
    load_params(dataclasses.replace(config, sha256=right))
    with pytest.raises(TokenizerFileError, match=r"^config.tokenizer.sha256: 00") as error:
        load_params(dataclasses.replace(config, sha256="00" * 32))
    assert right in one_line(error)


def test_tokenizers_import_neither_tensorflow_nor_pytorch():
    code = (
        "import sys, beit_jax.tokenizers.loading;"
        "print([name for name in ('tensorflow', 'torch') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert result.stdout.strip() == "[]"
